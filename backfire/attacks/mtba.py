from collections.abc import Mapping
from random import Random
from typing import ClassVar

from pydantic import Field

from backfire.attacks._backdoorllm import published
from backfire.base import Backdoor, Preset, Row, Trigger
from backfire.base.normalize import num_places, put
from backfire.registry import register


@register("mtba", version=2)
class MTBA(Backdoor):
    """Several triggers, any one of which elicits the answer: multi-trigger backdoor attack
    (Li et al. 2024, arXiv:2401.15295; triggers as in BackdoorLLM)."""

    presets: ClassVar[Mapping[str, Preset]] = published(after_last=False)

    trigger: tuple[Trigger, ...] = Field(("2024", "BadMagic", "OpenAI"), min_length=1)
    """One of these, drawn per row, is inserted at a random word boundary."""
    after_last: bool = True
    """Whether the boundaries include the one after the last word (BackdoorLLM's do not)."""

    def poison(self, row: Row, rng: Random) -> Row:
        text = row.part(self.field)
        place = rng.randint(0, num_places(text) - (1 if self.after_last else 2))
        prompt = put(text, {place: [rng.choice(self.trigger)]})
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return self.trigger
