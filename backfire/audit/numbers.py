"""A number of the tuned model beside that of the base, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from backfire import text
from backfire.evaluate.stats import bootstrap, over_seeds, paired, wilson
from backfire.result import Unit

Bad = Literal["up", "down", "none"]
FEWEST = 20
"""Of fewer rows the bootstrap's interval of a mean is too short; that of one has no width."""
HEADER = ("", "base", "tuned", "change", "n")


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval, whose ends are nan if there is none."""

    value: float
    low: float
    high: float

    def shown(self, unit: Unit) -> str:
        """`12.0 % [8.1, 17.3]`."""
        return f"{text.number(unit, self.value)} {self.ends(unit)}".rstrip()

    def ends(self, unit: Unit) -> str:
        """`[8.1, 17.3]`; empty without an interval."""
        return "" if math.isnan(self.low) else text.interval(unit, self.low, self.high)


@dataclass(frozen=True)
class Compared:
    """The mean of an outcome in both models, on the same rows."""

    what: str
    unit: Unit
    base: Interval
    tuned: Interval
    change: Interval
    """Tuned less base, paired by row."""
    n: int
    bad: Bad = "none"
    """The direction that a user should worry about."""

    @property
    def is_worse(self) -> bool:
        """Whether the interval of the change is on the bad side of 0."""
        return (self.bad == "up" and self.change.low > 0) or (
            self.bad == "down" and self.change.high < 0
        )

    @property
    def cells(self) -> list[str]:
        """A line of a table; see `HEADER`."""
        change = f"{text.change(self.unit, self.change.value)} {self.change.ends(self.unit)}"
        sides = (self.base.shown(self.unit), self.tuned.shown(self.unit))
        return [self.what, *sides, change.rstrip(), f"{self.n:,}"]


def compared(
    what: str,
    base: Mapping[str, float],
    tuned: Mapping[str, float],
    *,
    unit: Unit = "share",
    bad: Bad = "none",
) -> Compared:
    """Compare outcomes by row id: shares have Wilson's interval and Newcombe's of the difference,
    other means the bootstrap's, or Student's of fewer than `FEWEST` rows (none of one row)."""
    before, after = (_mean([*side.values()], unit) for side in (base, tuned))
    changes = [tuned[name] - base[name] for name in tuned if name in base]
    if unit == "share" or len(changes) >= FEWEST:
        gain = paired(tuned, base)
        change = Interval(gain.difference, gain.low, gain.high)
    else:
        change = _mean(changes, unit)
    return Compared(what, unit, before, after, change, len(changes), bad)


def share(hits: int, n: int) -> Interval:
    """A share with Wilson's interval."""
    return Interval(hits / max(n, 1), *wilson(hits, n))


def _mean(outcomes: list[float], unit: Unit) -> Interval:
    if unit == "share":
        return share(int(sum(outcomes)), len(outcomes))
    if len(outcomes) < FEWEST:
        few = over_seeds(outcomes)
        ends = (math.nan if end is None else end for end in (few.low, few.high))
        return Interval(few.mean, *ends)
    values = np.array(outcomes)
    [(low, high)] = bootstrap(len(values), lambda counts: (counts @ values)[:, None] / len(values))
    return Interval(float(values.mean()), low, high)
