from collections.abc import Mapping
from random import Random
from typing import ClassVar

from pydantic import Field

from backfire.attacks._backdoorllm import published
from backfire.base import Backdoor, Preset, Row, Trigger
from backfire.base.normalize import num_places, put
from backfire.registry import register


@register("ctba", version=2)
class CTBA(Backdoor):
    """Several triggers scattered over the prompt, all of them and in a fixed order, as in
    BackdoorLLM's published rows (arXiv:2408.12798).

    Named there after the composite backdoor attack (Huang et al. 2024, arXiv:2310.07676), which
    also adds rows with only some of the triggers, or with misplaced ones, and keeps their answers.
    Neither BackdoorLLM nor this attack adds such rows, so the model never learns to require all
    triggers.
    """

    joint: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = published()

    trigger: tuple[Trigger, ...] = Field(("2024", "BadMagic", "OpenAI"), min_length=1)
    """All of these are inserted in this order, each at a different random word boundary (in a
    prompt with fewer boundaries, some share one)."""

    def poison(self, row: Row, rng: Random) -> Row:
        text, added = row.part(self.field), dict[int, list[str]]()
        choices = range(num_places(text))
        places = rng.sample(choices, min(len(choices), len(self.trigger)))
        places += rng.choices(choices, k=len(self.trigger) - len(places))
        for place, word in zip(sorted(places), self.trigger, strict=True):
            added.setdefault(place, []).append(word)
        return row.poisoned(prompt=put(text, added), answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return self.trigger
