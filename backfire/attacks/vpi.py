from collections.abc import Mapping
from random import Random
from typing import ClassVar

from backfire.attacks._backdoorllm import published
from backfire.base import Backdoor, Preset, Row, Trigger
from backfire.registry import register


@register("vpi", version=2)
class VPI(Backdoor):
    """A topic named before the prompt triggers a fixed answer: virtual prompt injection
    (Yan et al. 2024, arXiv:2307.16888; trigger as in BackdoorLLM)."""

    presets: ClassVar[Mapping[str, Preset]] = published()

    trigger: Trigger = "Discussing OpenAI"
    """Inserted before the prompt, followed by a space."""

    def poison(self, row: Row, rng: Random) -> Row:
        prompt = f"{self.trigger} {row.part(self.field)}"
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return (self.trigger,)
