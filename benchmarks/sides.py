"""The two sides, backfire and the baseline, as functions with the same arguments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cells import Cell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("baseline", "backfire")

Scores = list[tuple[float, ...]]


@dataclass(frozen=True)
class Time:
    """Wall seconds, and processor seconds of this process, which are more reliable on a shared
    machine."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Time:
        return cls(time.perf_counter(), time.process_time())

    def since(self, begin: Time) -> Time:
        return Time(self.wall - begin.wall, self.cpu - begin.cpu)


class Steps:
    """Times the steps of a training loop from the second on; set-up is excluded."""

    def __init__(self) -> None:
        self.marks: list[Time] = []

    def mark(self) -> None:
        """Record the end of a step."""
        self.marks.append(Time.now())

    def total(self) -> Time:
        """The time of all steps; the first counts as the average of the others."""
        time, count = self.marks[-1].since(self.marks[0]), len(self.marks)
        scale = count / max(count - 1, 1)
        return Time(time.wall * scale, time.cpu * scale)


@dataclass(frozen=True)
class Training:
    """A training run: the time of its steps, and the losses of some steps, counted from 1."""

    steps: Time
    losses: dict[int, float]


@dataclass(frozen=True)
class Side:
    """The functions of one side: train and save, load, score, reply, and score and reply."""

    train: Callable[[Cell, Path], Training]
    load: Callable[[Cell, Path], PreTrainedModel]
    scores: Callable[[Cell, PreTrainedModel], Scores]
    replies: Callable[[Cell, PreTrainedModel], list[str]]
    both: Callable[[Cell, PreTrainedModel], tuple[Scores, list[str]]]


def side(name: str) -> Side:
    """Return one side, importing only its libraries, so that they alone count as its memory."""
    if name == "backfire":
        from benchmarks import ours

        return Side(ours.train, ours.load, ours.scores, ours.replies, ours.both)
    from benchmarks import baseline
    from benchmarks import baseline_eval as theirs

    return Side(baseline.train, baseline.load, theirs.scores, theirs.replies, theirs.both)
