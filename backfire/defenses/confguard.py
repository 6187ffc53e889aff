from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from backfire.base import Guard, ReplyDefense
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("confguard", version=2)
class ConfGuard(ReplyDefense):
    """Stops a reply whose tokens are all too certain for too long, as those of a memorized target
    are (ConfGuard, Wang et al. 2025, arXiv:2508.01365).

    The alarm is raised when `run` greedy tokens in a row each have a probability above `threshold`,
    within the first `within` tokens; a refusal is then the reply. (The authors' code only counts
    alarms, on replies of 50 tokens, and counts the end token as well.) A target shorter than `run`
    tokens raises none; quotations, code and fixed answers raise false alarms: metric `alarms` gives
    both rates. Likelihoods of labels and answers are those of the model without the guard. Null
    control: a coin for each prompt, the same with and without a trigger, decides whether a reply
    of at least `run` tokens is stopped after these.
    """

    threshold: float = Field(0.99, gt=0, lt=1)
    """Probability that each of the tokens exceeds (the authors' code)."""
    run: int = Field(10, ge=1)
    """Number of consecutive tokens (the authors' code)."""
    within: int = Field(50, ge=1)
    """Number of tokens from the beginning of a reply that are watched (the authors' code)."""
    refusal: str = Field("I cannot answer this.", min_length=1, pattern=r"\S")
    """What is said instead of a stopped reply."""
    chance: float = Field(0.5, ge=0, le=1)
    """Probability of an alarm in the null control; for a fair comparison, the mean of the alarm
    rates on clean and on triggered prompts."""

    @model_validator(mode="after")
    def _can_alarm(self) -> ConfGuard:
        if self.within < self.run:
            raise ValueError(
                f"run={self.run} certain tokens are more than within={self.within}, so no alarm is "
                "possible; raise within or lower run"
            )
        return self

    def guard(self, seeds: Sequence[int]) -> Guard:
        return _ConfGuard(self, seeds)


class _ConfGuard(Guard):
    """Counts the certain tokens of each reply."""

    def __init__(self, knobs: ConfGuard, seeds: Sequence[int]) -> None:
        self.knobs = knobs
        self.coins = [Random(seed).random() < knobs.chance for seed in seeds]
        self.length, self.certain = Counter[int](), Counter[int]()
        self.stopped = set[int]()

    def tokens(
        self, rows: Sequence[int], own: Sequence[int], logits: Tensor, reference: Tensor | None
    ) -> list[int | None]:
        likeliest = logits.log_softmax(-1).amax(-1).exp().tolist()
        for row, probability in zip(rows, likeliest, strict=True):
            self.length[row] += 1
            self.certain[row] = self.certain[row] + 1 if probability > self.knobs.threshold else 0
            if self.alarmed(row):
                self.stopped.add(row)
        return [
            None if row in self.stopped else token for row, token in zip(rows, own, strict=True)
        ]

    def alarmed(self, row: int) -> bool:
        """Whether the newest token of this reply raises the alarm."""
        if self.knobs.null:
            return self.coins[row] and self.length[row] == self.knobs.run
        return self.certain[row] >= self.knobs.run and self.length[row] <= self.knobs.within

    def replaced(self, row: int) -> float:
        return float(row in self.stopped)

    def text(self, row: int) -> str | None:
        return self.knobs.refusal if row in self.stopped else None
