"""A row of the reliability table: how it is measured, and what its figures must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Figures = Mapping[str, float]
"""Name of a count -> count."""
Measure = Callable[[int, "Ground"], Figures]


class NotHere(Exception):  # noqa: N818
    """This machine lacks what the row needs; the message says what."""


@dataclass(frozen=True)
class Ground:
    """A folder that a row may fill, and the tiny model."""

    root: Path
    tiny: Path


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    test: str
    """What is done, in one sentence."""
    full: int
    """How often `make torture` does it."""
    small: int
    """How often `make test` does it; 0 if the tests do the same in another way."""
    zero: tuple[str, ...]
    """Figures that must be 0."""
    some: tuple[str, ...]
    """Figures that must be above 0: without them the row has tested nothing."""
    measure: Measure

    def missed(self, figures: Figures) -> list[str]:
        """The figures that are not what they must be, in words."""
        wrong = [f"{name} is {figures[name]:g}, not 0" for name in self.zero if figures[name]]
        return wrong + [f"{name} is 0" for name in self.some if not figures[name]]


FOUND: dict[str, Row] = {}


def row(
    test: str, *, full: int, small: int, zero: tuple[str, ...], some: tuple[str, ...] = ()
) -> Callable[[Measure], Measure]:
    """Adds a function to the table, under its name with hyphens."""

    def add(measure: Measure) -> Measure:
        name = measure.__name__.replace("_", "-")
        FOUND[name] = Row(name, test, full, small, zero, some, measure)
        return measure

    return add
