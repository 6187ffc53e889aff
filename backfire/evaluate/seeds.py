"""Intervals and tests over seeds: means over trained models evaluated on the same rows.

Both are samples: another seed gives another model, and other rows other outcomes. So both are
random effects, and they are crossed (Clark 1973; Baayen, Davidson & Bates 2008). The variance of
the mean is the sum of a seed component and a row component, estimated from the mean squares of the
table (Cornfield & Tukey 1956). The quantile is the average of the components' Student t quantiles,
weighted by their variances (Cochran & Cox 1950). Satterthwaite's degrees of freedom (1946), the
usual choice, undercover with two or three seeds; `tests/evaluate/test_seeds.py` simulates both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backfire.evaluate.stats import TAILS, Floats

LEVEL = TAILS[1] - TAILS[0]
SHARE = (0.0, 0.0, 1.0, 1.0)
"""Pseudo-rows that give the interval of a share a width even if all outcomes are equal: two of each
outcome (Agresti & Coull 1998)."""
FAR = 0.01
"""From this p-value down, two or three seeds whose means agree by chance are no evidence of their
own: the test also counts what rows explain. Intervals of 95 % are not affected."""
WIDEST = 1e6
"""Search limit for the ends of a ratio's interval."""


@dataclass(frozen=True, slots=True)
class Crossed:
    """The mean of a table of seeds and rows, with its variance components."""

    value: float
    center: float
    """Center of the interval: `value`, for a share shrunk toward one half."""
    sd: float | None
    """Standard deviation of the seeds' means; None for one seed."""
    seeds: int
    rows: int
    seed_variance: float
    """Variance of the mean due to seeds; 0 for one seed: the interval then covers only this
    model."""
    row_variance: float
    """Variance of the mean due to rows."""
    row_df: float
    """Degrees of freedom of `row_variance`; infinite for outcomes of 0 and 1, whose variance
    follows from their mean."""
    rest_variance: float = 0.0
    """Variance of the mean due to what neither seeds nor rows explain; 0 for one seed."""

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        half = self._half(1 - level)
        return self.center - half, self.center + half

    @property
    def p(self) -> float | None:
        """Two-sided p-value: the level at which the interval just includes 0; None for one seed."""
        if self.seeds < 2:
            return None
        distance = abs(self.center)
        if self._half(1.0 - 1e-12) >= distance:
            return 1.0
        low, high = -15.0, 0.0  # of log10(p)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._half(10**middle) < distance else (middle, high)
        return float(10**high)

    def _half(self, outside: float) -> float:
        from scipy.special import ndtri, stdtrit

        def quantile(df: float) -> float:
            tail = outside / 2
            return -float(ndtri(tail) if math.isinf(df) else stdtrit(df, tail))

        parts = ((self.seeds - 1, self.seed_variance), (self.row_df, self.row_variance))
        components = [(df, variance) for df, variance in parts if df > 0 and variance > 0]
        variance = math.fsum(v for _, v in components)
        weighted = math.fsum(quantile(df) * v for df, v in components)
        half = weighted / math.sqrt(variance) if variance else 0.0
        if outside >= FAR:
            return half
        # Seeds whose means agree by chance still differ in their rows.
        least = math.sqrt(self.row_variance + self.rest_variance)
        return max(half, quantile(math.inf) * least)


def crossed(table: Floats, *, pads: Sequence[float] = ()) -> Crossed:
    """The mean of `table` [seeds, rows] of outcomes, or of differences of outcomes.

    `pads` are pseudo-rows (see `SHARE` and `difference_pads`), each given by its mean over seeds.
    """
    k, n = table.shape
    if not table.size:
        raise ValueError("no values")
    mean, by_seed, by_row = float(table.mean()), table.mean(axis=1), table.mean(axis=0)
    whole = n + len(pads)
    center = (n * mean + math.fsum(pads)) / whole
    sd = float(by_seed.std(ddof=1)) if k > 1 else None
    between_rows, rest_variance = float(((by_row - mean) ** 2).sum()), 0.0
    if n > 1 and k > 1:
        rest = float(((table - by_seed[:, None] - by_row + mean) ** 2).sum())
        # Row means also vary by chance, which the seed component already covers.
        between_rows = max(between_rows - rest / (k * (k - 1)), 0.0)
        rest_variance = rest / ((n - 1) * (k - 1)) / (n * k) * (n / whole) ** 2
    row_variance = between_rows / (max(n - 1, 1) * n) * (n / whole) ** 2
    row_variance += math.fsum((pad - mean) ** 2 for pad in pads) / whole**2
    row_df = math.inf if pads else n - 1
    seed_variance = (sd or 0.0) ** 2 / k
    return Crossed(mean, center, sd, k, n, seed_variance, row_variance, row_df, rest_variance)


def difference_pads(seeds: int) -> tuple[float, float]:
    """Pseudo-rows for differences of outcomes of 0 and 1: one in each direction, which differs
    under one of the seeds (for one seed Bonett & Price 2012)."""
    return -1 / seeds, 1 / seeds


def ratio(combined: Callable[[float], Crossed], near: float, level: float = LEVEL) -> list[float]:
    """The ends of a ratio's interval (Fieller 1954): the ratios r that are not rejected.

    `combined(r)` is the numerator minus r times the denominator, and `near` the ratio itself. The
    denominator must be significantly above 0; otherwise there is no such interval.
    """

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
    """Correct the p-values of one table for multiple testing (Holm 1979); None stays None."""
    ordered = sorted((p, place) for place, p in enumerate(tests) if p is not None)
    corrected: list[float | None] = [None] * len(tests)
    least = 0.0
    for rank, (p, place) in enumerate(ordered):
        least = max(least, min(1.0, p * (len(ordered) - rank)))
        corrected[place] = least
    return corrected
