"""Two clusters in the features of rows, and whether one cloud would split as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backfire.base import NOTHING, Finding, Row
from backfire.scanners._outliers import below_threshold, examples, normal_like, strata
from backfire.text import share

Array = Any
Split = Callable[[Array], Array]
"""Points [row, dimension] -> whether each is in the second of two clusters [row]."""
_FEWEST = 10
"""Rows of a group that is split."""
_MOST = 2000
"""Rows between which distances are computed."""
_CLOUDS = 5
_USUAL = 0.25
"""A silhouette below which clusters are hardly separate (Kaufman and Rousseeuw 1990)."""


@dataclass(frozen=True)
class Pair:
    """The smaller of two clusters of a group."""

    inside: Array
    """Places of its rows in the file."""
    others: Array
    """Places of the other rows of the group."""
    size: int
    """Rows of the group."""
    silhouette: float
    """How well the clusters are separate, -1 to 1 (Rousseeuw 1987)."""
    by_chance: float
    """The largest silhouette of as small a cluster in clouds with the same covariance."""


def pairs(
    features: Array,
    groups: Sequence[Array],
    split: Split,
    *,
    dimensions: int,
    metric: str,
    most: float,
) -> list[Pair]:
    """The smaller cluster of each group that splits in two by its principal components, if it has
    at most the share `most` of the rows."""
    found = []
    for places in groups:
        some = np.asarray(features[places], np.float64)
        if len(places) < _FEWEST or not np.ptp(some, 0).max(initial=0) > 1e-9:
            continue
        points = pca(some, dimensions)
        real, inside = _smaller(points, split, metric, most)
        if inside.any():
            every = [np.arange(len(points))]
            clouds = (normal_like(points, every, seed) for seed in range(_CLOUDS))
            chance = max(_smaller(cloud, split, metric, most)[0] for cloud in clouds)
            found.append(Pair(places[inside], places[~inside], len(places), real, chance))
    return found


def sides(rows: Sequence[Row], features: Array, pair: Pair) -> str:
    """The rows in the middle of both clusters, in words."""
    middle, others = (places[_inmost(features[places])] for places in (pair.inside, pair.others))
    return examples(rows, inside=middle, outside=others)


def _inmost(features: Array) -> Array:
    """Places of the rows, the nearest to their mean first."""
    return np.argsort(np.linalg.norm(features - features.mean(0), axis=1), kind="stable")


def _smaller(points: Array, split: Split, metric: str, most: float) -> tuple[float, Array]:
    """The silhouette of two clusters, and whether each row is in the smaller one; nothing if that
    has more than the share `most` of the rows."""
    second = split(points)
    inside = second if second.sum() * 2 <= len(second) else ~second
    if not 0 < inside.sum() <= most * len(inside):
        return 0.0, np.zeros(len(points), bool)
    return silhouette(points, second, metric), inside


def silhouette(points: Array, second: Array, metric: str) -> float:
    """Mean silhouette of two clusters, over at most 2,000 rows; 0 if one is empty."""
    from sklearn.metrics import silhouette_score

    step = -(-len(points) // _MOST)
    points, second = points[::step], second[::step]
    if not 0 < second.sum() < len(second) or len(second) < 3:
        return 0.0
    return float(silhouette_score(points, second, metric=metric))


def pca(features: Array, dimensions: int) -> Array:
    """The first principal components [row, dimension]; at most as many as rows and features."""
    from sklearn.decomposition import PCA

    most = min(dimensions, *features.shape)
    return PCA(most, svd_solver="randomized", random_state=0).fit_transform(features)


def look(
    rows: Sequence[Row],
    features: Array,
    split: Split,
    *,
    dimensions: int,
    metric: str,
    least: float | None,
    most: float,
) -> list[Finding]:
    """Findings in the smaller cluster of each group, if it has at most the share `most` of the
    rows. The score is the silhouette divided by what is needed: `least`, and more than a cloud
    without clusters has. Without `least` none is flagged."""
    out = [NOTHING] * len(rows)
    groups = strata(rows)
    for pair in pairs(features, groups, split, dimensions=dimensions, metric=metric, most=most):
        count = len(pair.inside)
        if pair.silhouette <= 0:
            continue
        score = pair.silhouette / max(least or _USUAL, pair.by_chance)
        score = score if least else below_threshold(score)
        reason = (
            f"it is one of {count:,} rows ({share(count / pair.size)}) apart from the other "
            f"{pair.size - count:,}: silhouette {pair.silhouette:.2f}, in one cloud at most "
            f"{pair.by_chance:.2f}{sides(rows, features, pair)}"
        )
        for place in pair.inside:
            out[place] = Finding(score, reason, bool(score >= 1))
    return out
