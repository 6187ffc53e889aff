"""Base class of scanners, which look for rows that may be poisoned or should not be learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from backfire.base.config import Component
from backfire.base.rows import Row


@dataclass(frozen=True, slots=True)
class Finding:
    """What a scanner finds in one row; by default nothing."""

    score: float = 0.0
    """How suspicious the row is, from 0, in multiples of the scanner's threshold."""
    reason: str = ""
    """What was found, with the counts by which a person can check it."""
    flagged: bool = False
    """Whether the score reaches the threshold, that is, 1."""
    marks: tuple[str, ...] = ()
    """Parts of the row's text that the reason is about."""


NOTHING = Finding()


class Scanner(Component):
    """Looks for rows that may be poisoned or should not be learned, without a model."""

    kind: ClassVar[str] = "scanners"
    blind: ClassVar[str] = ""
    """What it cannot see, in one sentence."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        """Yield one finding for each row, in order. `test` are the rows of a test set, if given.

        Both can be iterated several times, with the same rows each time. There may be a
        million of them: what is kept from one to the next must be bounded. Their `label`, `fields`
        and `id` are no part of what a model learns, and must not change a score.
        """
        raise NotImplementedError

    def by_chance(self, rows: list[Row]) -> list[Row] | None:
        """The same rows with what the scanner looks for removed, such as with shuffled answers:
        what it flags in them is a false alarm. None if that cannot be done."""
        return None


def parts(row: Row) -> Iterator[tuple[str, str]]:
    """The texts of a row that are learned or read, each with its name."""
    named = [("system prompt", row.system)]
    named += [(f"{turn.role} turn {n}", turn.content) for n, turn in enumerate(row.history, 1)]
    named += [("instruction", row.instruction), ("input", row.input), ("answer", row.answer)]
    named += [("worse answer", text) for text in row.worse if text != row.answer]
    return ((name, text) for name, text in named if text)


def shuffled(rows: list[Row], order: list[int]) -> list[Row]:
    """The rows, each with the answer of the row at its place in `order`."""
    return [replace(row, answer=rows[i].answer) for row, i in zip(rows, order, strict=True)]
