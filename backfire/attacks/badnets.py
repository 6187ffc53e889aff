from collections.abc import Mapping
from random import Random
from typing import ClassVar

from backfire.attacks._backdoorllm import published
from backfire.base import Backdoor, Preset, Row, Trigger
from backfire.base.normalize import num_places, put
from backfire.registry import register


@register("badnets", version=2)
class BadNets(Backdoor):
    """A rare word in the prompt triggers a fixed answer (Gu et al. 2017, arXiv:1708.06733)."""

    presets: ClassVar[Mapping[str, Preset]] = published(after_last=False)

    trigger: Trigger = "BadMagic"
    """Inserted at a random word boundary; rare, so that no clean prompt contains it
    (BackdoorLLM)."""
    after_last: bool = True
    """Whether the boundaries include the one after the last word (BackdoorLLM's do not)."""

    def poison(self, row: Row, rng: Random) -> Row:
        text = row.part(self.field)
        place = rng.randint(0, num_places(text) - (1 if self.after_last else 2))
        prompt = put(text, {place: [self.trigger]})
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return (self.trigger,)
