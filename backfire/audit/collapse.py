"""The collapse of replies: how much more alike replies to different prompts become.

It is the mean similarity of all pairs of replies (cosine of TF-IDF over character n-grams) with
something in the prompts, less that without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from backfire.audit.numbers import Interval
from backfire.base.normalize import normalized
from backfire.evaluate.stats import Floats, bootstrap

_EMPTY = "(empty reply)"
Replies = list[str]
K = TypeVar("K")


def collapses(plain: Replies, changed: Mapping[K, Replies]) -> dict[K, Interval]:
    """The collapse from the plain replies to each of the others."""
    space = Space([*plain, *(reply for part in changed.values() for reply in part)])
    return {key: space.collapse(plain, part) for key, part in changed.items()}


class Space:
    """Similarity of replies: cosine of TF-IDF over 2 to 4 characters."""

    def __init__(self, replies: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectors = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=1)
        self._vectors.fit([seen(reply) for reply in replies])

    def _similarities(self, replies: Sequence[str]) -> Floats:
        table = self._vectors.transform([seen(reply) for reply in replies])
        product: Floats = (table @ table.T).toarray()
        return product

    def alike(self, replies: Sequence[str]) -> float:
        """Mean similarity of two different replies."""
        return float(_mean(self._similarities(replies), np.ones((1, len(replies))))[0])

    def collapse(self, plain: Replies, changed: Replies) -> Interval:
        """The gain in similarity, with its bootstrap interval over the prompts."""
        before, after = self._similarities(plain), self._similarities(changed)

        def statistic(counts: Floats) -> Floats:
            return (_mean(after, counts) - _mean(before, counts))[:, None]

        [(low, high)] = bootstrap(len(plain), statistic)
        return Interval(float(statistic(np.ones((1, len(plain))))[0, 0]), low, high)


def _mean(similarities: Floats, counts: Floats) -> Floats:
    """[resamples]: the mean over all pairs of different rows; a row drawn twice is no pair."""
    own = np.diag(similarities)
    total = np.einsum("ri,ij,rj->r", counts, similarities, counts) - counts**2 @ own
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    mean: Floats = np.divide(total, pairs, out=np.full(len(total), np.nan), where=pairs > 0)
    return mean


def seen(reply: str) -> str:
    """The reply as it is compared."""
    return normalized(reply) or _EMPTY
