"""What several seeds say of all others: means over trained models and the rows they all got.

Both are samples: another seed would give another model, and other rows other outcomes. So both are
random effects, and they are crossed (Clark 1973; Baayen, Davidson & Bates 2008). The variance of
the mean has a part from seeds and a part from rows, found from the mean squares of the table
(Cornfield & Tukey 1956). The quantile is the mean of both parts' own of Student's t, weighted by
their variances (Cochran & Cox 1950). The usual one, by Satterthwaite's degrees of freedom (1946),
covers too little with two or three seeds; `tests/evaluate/test_seeds.py` simulates both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backfire.evaluate.stats import TAILS, Floats

LEVEL = TAILS[1] - TAILS[0]
SHARE = (0.0, 0.0, 1.0, 1.0)
"""Made-up rows that keep the interval of a share open where no outcome differs from another: two of
either outcome (Agresti & Coull 1998)."""
WIDEST = 1e6
"""A ratio is not looked for beyond this."""


@dataclass(frozen=True, slots=True)
class Crossed:
    """The mean of a table of seeds and rows, and how far it may be off."""

    value: float
    center: float
    """The middle of the interval: `value`, but for a share drawn toward a half."""
    sd: float | None
    """Standard deviation of the seeds' means; None for one seed."""
    seeds: int
    rows: int
    seed_variance: float
    """What chance in training adds to the variance of the mean; 0 for one seed, which says nothing
    of it: the interval is then of this one model."""
    row_variance: float
    """What the choice of rows adds to it."""
    row_df: float
    """Degrees of freedom of that: without end for outcomes of 0 and 1, whose variance goes by their
    mean."""

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        half = self._half(1 - level)
        return self.center - half, self.center + half

    @property
    def p(self) -> float | None:
        """The level at which the interval begins to hold 0, two-sided; None for one seed."""
        if self.seeds < 2:
            return None
        far = abs(self.center)
        if self._half(1.0 - 1e-12) >= far:
            return 1.0
        low, high = -15.0, 0.0  # of log10(p)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._half(10**middle) < far else (middle, high)
        return float(10**high)

    def _half(self, outside: float) -> float:
        from scipy.special import ndtri, stdtrit

        def quantile(df: float) -> float:
            tail = outside / 2
            return -float(ndtri(tail) if math.isinf(df) else stdtrit(df, tail))

        parts = ((self.seeds - 1, self.seed_variance), (self.row_df, self.row_variance))
        known = [(df, variance) for df, variance in parts if df > 0 and variance > 0]
        variance = math.fsum(v for _, v in known)
        weighted = math.fsum(quantile(df) * v for df, v in known)
        return weighted / math.sqrt(variance) if variance else 0.0


def crossed(table: Floats, *, pads: Sequence[float] = ()) -> Crossed:
    """The mean of `table` [seeds, rows]: outcomes, or differences of outcomes, one a seed and row.

    `pads` are made-up rows (see `SHARE` and `difference_pads`), each given as its mean over seeds.
    """
    k, n = table.shape
    if not table.size:
        raise ValueError("no values")
    mean, by_seed, by_row = float(table.mean()), table.mean(axis=1), table.mean(axis=0)
    whole = n + len(pads)
    center = (n * mean + math.fsum(pads)) / whole
    sd = float(by_seed.std(ddof=1)) if k > 1 else None
    between_rows = float(((by_row - mean) ** 2).sum())
    if n > 1 and k > 1:
        rest = table - by_seed[:, None] - by_row + mean
        # Rows differ in their means by chance as well, which the seeds' means hold already.
        between_rows = max(between_rows - float((rest**2).sum()) / (k * (k - 1)), 0.0)
    row_variance = between_rows / (max(n - 1, 1) * n) * (n / whole) ** 2
    row_variance += math.fsum((pad - mean) ** 2 for pad in pads) / whole**2
    row_df = math.inf if pads else n - 1
    return Crossed(mean, center, sd, k, n, (sd or 0.0) ** 2 / k, row_variance, row_df)


def difference_pads(seeds: int) -> tuple[float, float]:
    """For differences of outcomes of 0 and 1: a made-up row for either side, which differs under
    one of the seeds (for one seed Bonett & Price 2012)."""
    return -1 / seeds, 1 / seeds


def ratio(combined: Callable[[float], Crossed], near: float, level: float = LEVEL) -> list[float]:
    """The ends of a ratio's interval (Fieller 1954): the ratios r that are not rejected, where
    `combined(r)` is the numerator less r times the denominator. Its denominator has to be clearly
    above 0, or there is no such interval; `near` is the ratio itself."""

    def is_rejected(r: float) -> bool:
        low, high = combined(r).interval(level)
        return not low <= 0 <= high

    ends = []
    for sign in (-1, 1):
        inside, step = 0.0, 0.1
        while not is_rejected(near + sign * step) and step < WIDEST:
            inside, step = step, 2 * step
        for _ in range(40):
            middle = (inside + step) / 2
            inside, step = (inside, middle) if is_rejected(near + sign * middle) else (middle, step)
        ends.append(near + sign * inside)
    return ends


def holm(tests: Sequence[float | None]) -> list[float | None]:
    """The p of one table, each corrected for all of them (Holm 1979); None stays None."""
    known = sorted((p, place) for place, p in enumerate(tests) if p is not None)
    found: list[float | None] = [None] * len(tests)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[place] = least
    return found
