"""How far answers agree with a model's replies, and clusters of those that do not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from backfire.base.normalize import words

Array = Any
MOST = 10
"""Most clusters that are tried."""
_SENTENCE: Final = re.compile(r"[.!?;。！？；]+")


def agreement(answer: str, reply: str) -> float:
    """The smallest share of word pairs that a sentence of the answer has in common with the reply,
    0 to 100: the clipped bigram precision of BLEU (Papineni et al. 2002), without smoothing. 100 if
    no sentence has two words."""
    known = Counter(pairwise(words(reply)))
    least = 100.0
    for sentence in _SENTENCE.split(answer):
        own = Counter(pairwise(words(sentence)))
        if own:
            least = min(least, 100 * sum((own & known).values()) / own.total())
    return least


def number_of_clusters(errors: Sequence[float]) -> int | None:
    """k for the sums of squared distances with 1 to 10 clusters, by RFTC's rule; None if none fits.

    With drops D_i = L_i - L_{i+1}, i from 0: the first i >= 1 by which the error has fallen by more
    than 40 % of its whole fall, and where D_i <= 0.4 D_0 or D_i <= 0.4 D_{i-1}; k = i + 1, but 4
    instead of 9.
    """
    drops = [a - b for a, b in pairwise(errors)]
    whole = errors[0] - errors[-1]
    for i in range(1, len(drops)):
        levels = drops[i] <= 0.4 * drops[0] or drops[i] <= 0.4 * drops[i - 1]
        if errors[0] - errors[i] > 0.4 * whole and levels:
            return 4 if i + 1 == MOST - 1 else i + 1
    return None


@dataclass(frozen=True)
class Clusters:
    """Clusters of texts."""

    of: Array
    """Each text's cluster [text]."""
    distances: Array
    """Each text's distance to the center of its cluster [text]."""
    means: list[float]
    """The mean distance in each cluster."""

    @property
    def loosest(self) -> int:
        return int(np.argmax(self.means))


def clusters_of(texts: Sequence[str]) -> Clusters | None:
    """Clusters of the texts by TF-IDF; None if they are fewer than three different ones, or do not
    form clusters."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    most = min(MOST, len(set(texts)))
    if most < 3:
        return None
    vectors = TfidfVectorizer(analyzer=lambda text: words(text.casefold())).fit_transform(texts)
    vectors.sort_indices()
    most = min(most, len({(*row.indices, *row.data.round(6)) for row in vectors}))
    if most < 3:
        return None

    def fitted(k: int) -> Any:
        return KMeans(k, n_init=10, max_iter=600, tol=1e-5, random_state=0).fit(vectors)

    errors = [float(fitted(k).inertia_) for k in range(1, most + 1)]
    k = number_of_clusters([*errors, *[errors[-1]] * (MOST - most)])
    if k is None:
        return None
    found = fitted(min(k, most))
    distances = found.transform(vectors)[np.arange(len(texts)), found.labels_]
    groups = [distances[found.labels_ == n] for n in range(found.n_clusters)]
    return Clusters(found.labels_, distances, [float(group.mean()) for group in groups])
