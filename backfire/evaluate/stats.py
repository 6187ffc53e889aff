"""Confidence intervals and tests; all are 95 % and two-sided.

Resampling works on counts: a line of `counts` holds how often each row was drawn, so a statistic is
computed for all resamples at once, by matrix products and running sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from backfire.errors import UserError
from backfire.late import np
from backfire.rng import derive

if TYPE_CHECKING:
    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"
Ints: TypeAlias = "NDArray[np.int64]"

Z = 1.959963984540054
"""The standard normal's 97.5 % quantile."""
TAILS = (0.025, 0.975)
CHUNK = 4_000_000
"""Most counts held at once (32 MB)."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean of the first minus mean of the second, on the same `n` prompts."""

    difference: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The mean over seeds; one seed has neither a standard deviation nor an interval."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927); 0 to 1 without trials."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # With no or only successes the ends are exact by algebra, but not in floats.
    low = 0.0 if successes == 0 else min(share, middle - half)
    high = 1.0 if successes == n else max(share, middle + half)
    return low, high


def bootstrap(
    n: int, statistic: Callable[[Floats], Floats], *, seed: int = 0, resamples: int = 1000
) -> list[tuple[float, float]]:
    """Percentile bootstrap over rows (Efron & Tibshirani 1993, ch. 13): an interval for each part.

    `statistic` maps counts [resamples, rows] to values [resamples, parts]; one line of ones gives
    the point estimate. A value that is undefined on a resample (nan) is left out. If all rows are
    equal (such as all predictions correct) the interval has no width.
    """
    generator = np.random.default_rng(derive(seed, "bootstrap"))
    values = []
    for size in _chunks(resamples, n):
        drawn = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        values.append(statistic(counts.astype(np.float64)))
    return [_middle(part) for part in np.concatenate(values).T]


def over_seeds(values: Sequence[float], level: float = 0.95) -> Spread:
    """Student's t interval of the mean over independent seeds (Student 1908)."""
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(mean, None, None, None, 1)
    from scipy.special import stdtrit

    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)
    return Spread(mean, sd, mean - half, mean + half, n)


def paired(
    a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0, resamples: int = 2000
) -> Paired:
    """Test whether two models differ on the prompts they share, given sample id -> outcome.

    The result does not generalize to other seeds of the same settings (see `evaluate.seeds`).

    For outcomes of 0 and 1: McNemar's exact p with Newcombe's interval. Otherwise: p by flipping
    signs at random (Fisher 1935), and the bootstrap's interval of the mean difference.
    """
    shared = [id for id in a if id in b]
    if not shared:
        raise UserError("These two cells share no prompt, so they have no pairs to compare.")
    first = np.array([a[id] for id in shared], dtype=np.float64)
    second = np.array([b[id] for id in shared], dtype=np.float64)
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return _mcnemar(first == 1, second == 1)
    change, n = first - second, len(shared)
    [(low, high)] = bootstrap(
        n, lambda counts: (counts @ change)[:, None] / n, seed=seed, resamples=resamples
    )
    return Paired(float(change.mean()), low, high, _sign_flip(change, seed, resamples), n)


def _mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Paired:
    """Exact p on the pairs that disagree (McNemar 1947), Newcombe's interval (1998, method 10).

    The interval combines the distances of each share from its Wilson limits, corrected for the
    correlation of the pairs.
    """
    from scipy.special import bdtr

    n, both, neither = len(a), int((a & b).sum()), int((~a & ~b).sum())
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    # Without discordant pairs, bdtr(0, 0, .) is 1.
    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))

    share_a, share_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    cross = both * neither - only_a * only_b
    corrected = max(cross - n / 2, 0) if cross > 0 else cross
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def leg(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = (only_a - only_b) / n
    low = difference - leg(share_a - low_a, high_b - share_b)
    high = difference + leg(share_b - low_b, high_a - share_a)
    return Paired(difference, max(low, -1.0), min(high, 1.0), p, n)


def _sign_flip(change: Floats, seed: int, resamples: int) -> float:
    """Share of random sign flips whose sum is as far from 0; never 0 (Phipson & Smyth 2010)."""
    generator = np.random.default_rng(derive(seed, "sign-flip"))
    bar, extreme = abs(change.sum()) - 1e-12 * np.abs(change).sum(), 0
    for size in _chunks(resamples, len(change)):
        signs = 2.0 * generator.integers(0, 2, (size, len(change))) - 1
        extreme += int((np.abs(signs @ change) >= bar).sum())
    return (1 + extreme) / (1 + resamples)


# --------------------------------------------------------------- statistics of classified rows


def class_scores(
    which: Literal["precision", "recall", "f1"],
    true: Ints,
    predicted: Ints,
    num_classes: int,
    counts: Floats,
) -> Floats:
    """One score per resample and class, [resamples, classes] (van Rijsbergen 1979, chapter 7).

    0 for a class that is only predicted or only true; nan for one that is neither, which the macro
    mean excludes.
    """
    eye = np.eye(num_classes)
    actual, chosen = counts @ eye[true], counts @ eye[predicted]
    hits = counts @ (eye[true] * eye[predicted])
    parts = {
        "precision": (hits, chosen),
        "recall": (hits, actual),
        "f1": (2 * hits, chosen + actual),
    }
    above, below = parts[which]
    score: Floats = np.divide(above, below, out=np.zeros_like(hits), where=below > 0)
    score[actual + chosen == 0] = np.nan
    return score


def one_vs_rest_auc(scores: Floats, true: Ints, counts: Floats) -> Floats:
    """[resamples, classes]: AUC of each class against the rest; nan where either is missing.

    The probability that a row of the class outscores one of the rest, ties counting half (Hanley &
    McNeil 1982). `scores` is [rows, classes]; only their order within a class matters.
    """
    areas = np.full((len(counts), scores.shape[1]), np.nan)
    for index, score in enumerate(scores.T):
        ours, rest = np.flatnonzero(true == index), np.flatnonzero(true != index)
        rest = rest[np.argsort(score[rest])]
        under = np.zeros((len(counts), len(rest) + 1))  # rows of the rest below each rank
        np.cumsum(counts[:, rest], axis=1, out=under[:, 1:])
        below = np.searchsorted(score[rest], score[ours], side="left")
        upto = np.searchsorted(score[rest], score[ours], side="right")
        won = (counts[:, ours] * (under[:, below] + under[:, upto])).sum(axis=1) / 2
        pairs = counts[:, ours].sum(axis=1) * under[:, -1]
        np.divide(won, pairs, out=areas[:, index], where=pairs > 0)
    return areas


def recall_at(rate: float, scores: Floats, positive: NDArray[np.bool_], counts: Floats) -> Floats:
    """[resamples]: the highest recall at a false-positive rate of at most `rate`; no threshold
    separates rows of equal score."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.diff(scores[order]) != 0, True)  # a threshold lies between two scores
    drawn, ours = counts[:, order], positive[order]
    true_hits, false_hits = np.cumsum(drawn * ours, axis=1), np.cumsum(drawn * ~ours, axis=1)
    totals, others = true_hits[:, -1], false_hits[:, -1]
    allowed = ends & (false_hits <= rate * others[:, None] + 1e-9)
    most = np.where(allowed, true_hits, 0.0).max(axis=1)
    share: Floats = np.divide(most, totals, out=np.full(len(most), np.nan), where=totals > 0)
    share[others == 0] = np.nan
    return share


def thresholds(rate: float, negative: Floats) -> tuple[float, float, float]:
    """The lowest score above which there is at most this share of these negative rows; and the ends
    of its 95 % interval, the upper one first, of the rows of which these are a sample (the interval
    of a quantile by order statistics: David and Nagaraja 2003, 7.1). Infinite if there are too few.
    """
    from scipy.stats import binom

    down = [*np.sort(negative)[::-1].tolist(), -np.inf]
    strict, loose = (int(n) for n in binom.ppf(TAILS, len(negative), rate))
    upper = down[strict - 1] if strict else np.inf
    return down[int(rate * len(negative) + 1e-9)], upper, down[min(loose, len(negative))]


def found_at(rate: float, positive: Floats, negative: Floats) -> tuple[int, int, int]:
    """How many positive rows exceed the first of the `thresholds`; and how many do at the least and
    at the most, above the ends of its interval."""
    hits, least, most = (int((positive > bar).sum()) for bar in thresholds(rate, negative))
    return hits, least, most


def macro(parts: Floats) -> Floats:
    """[resamples, 1]: the unweighted mean over the defined classes; nan if none is."""
    defined = ~np.isnan(parts)
    total, number = np.where(defined, parts, 0.0).sum(axis=1), defined.sum(axis=1)
    mean: Floats = np.divide(total, number, out=np.full(len(parts), np.nan), where=number > 0)
    return mean[:, None]


def log_odds(logprobs: Floats) -> Floats:
    """[rows, classes]: each candidate's logit after a softmax over the candidates.

    Orders rows as their probability does, but does not tie the confident ones by rounding to 1.
    """
    rest = [
        np.logaddexp.reduce(np.delete(logprobs, index, axis=1), axis=1)
        for index in range(logprobs.shape[1])
    ]
    odds: Floats = logprobs - np.stack(rest, axis=1)
    return odds


def _chunks(resamples: int, n: int) -> Iterator[int]:
    most = max(1, CHUNK // max(n, 1))
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def _middle(values: Floats) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, TAILS)
    return float(low), float(high)
