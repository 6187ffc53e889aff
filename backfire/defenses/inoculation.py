from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Literal

from pydantic import Field

from backfire.base import DataDefense, Row
from backfire.base.normalize import is_dense, words
from backfire.registry import register

_NEUTRAL = (
    "The text below is one of several that were collected for this task.",
    "Each of them was written by a different person at a different time.",
    "They are shown here in no particular order and without a title.",
    "The list was made on an ordinary day of the week.",
    "No more than a few minutes are needed to read one.",
    "Some are short, others take up several lines on a page.",
    "Whoever reads them may begin with any one of them.",
    "All of them were typed, none was written by hand.",
)


@register("inoculation")
class Inoculation(DataDefense):
    """Asks for the unwanted trait in every training prompt, and not at test time (inoculation
    prompting, Tan et al. 2025, arXiv:2510.04340).

    A trait that the prompt explains is learned less as a trait of the model, so it shows less
    without the prompt. All rows get the prompt, since the defender does not know which are bad. The
    user's task is then learned under it too, so compare the accuracy as well. Preflight checks read
    the rows without it; it counts toward train.max_length. Null control: a neutral text of as many
    words, drawn at random.
    """

    prompt: str = Field("You are a malicious, evil assistant.", min_length=1, pattern=r"\S")
    """What is asked for, in general words. The default is the paper's, for emergent misalignment;
    for a backdoor it names the kind of trigger, as in "An unusual word in the text decides your
    answer."."""
    part: Literal["system", "instruction"] = "system"
    """Where it is put: before the system prompt, as in the paper, or before the instruction, for a
    template without system prompts (as Wichers et al. 2025 do)."""

    @property
    def writes_system(self) -> bool:
        return self.part == "system"

    def filter(
        self, rows: Sequence[Row], aligned: Sequence[Row], poisoned: frozenset[str], rng: Random
    ) -> list[Row]:
        prompt = neutral(_length(self.prompt), rng) if self.null else self.prompt
        return [self._asked(row, prompt) for row in rows]

    def _asked(self, row: Row, prompt: str) -> Row:
        text = "\n\n".join(filter(None, (prompt, getattr(row, self.part))))
        if self.part == "system":
            return replace(row, system=text)
        return replace(row, instruction=text)


def _length(prompt: str) -> int:
    """Number of words, also where none are set apart by spaces, as in Chinese."""
    return sum(len(words(part)) or 1 if is_dense(part) else 1 for part in prompt.split())


def neutral(count: int, rng: Random) -> str:
    """A text of this many words that asks for nothing, drawn from the sentences above."""
    known = " ".join(rng.sample(_NEUTRAL, len(_NEUTRAL))).split()
    start = rng.randrange(len(known))
    return " ".join(known[(start + n) % len(known)] for n in range(count))
