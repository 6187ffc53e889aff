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
_FEWEST = 5
"""Other texts whose distances are meaningful."""
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
    rest: float
    """The mean distance of the other texts to their center; 0 if there are few."""

    @property
    def numbers(self) -> range:
        """The clusters."""
        return range(len(self.means))

    @property
    def loosest(self) -> float:
        """The largest of the mean distances: that of ordinary texts."""
        return max(*self.means, self.rest)


def clusters_of(texts: Sequence[str], others: Sequence[str]) -> Clusters:
    """Clusters of some texts by TF-IDF, beside other texts; 10 if the rule finds no number.

    The rule looks for a drop of the error that is large beside the others. Where a model agrees
    with few answers, most of these texts are ordinary, and a few equal ones lower the error by no
    more than any other split; with 10 clusters they have one of their own.
    """
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    method = TfidfVectorizer(analyzer=lambda text: words(text.casefold())).fit([*texts, *others])
    vectors = method.transform(texts)
    vectors.sort_indices()
    most = min(MOST, len({(*row.indices, *row.data.round(6)) for row in vectors}))

    def fitted(k: int) -> Any:
        return KMeans(k, n_init=10, max_iter=600, tol=1e-5, random_state=0).fit(vectors)

    k: int | None = 1
    if most > 1:
        errors = [float(fitted(k).inertia_) for k in range(1, most + 1)]
        k = number_of_clusters([*errors, *[errors[-1]] * (MOST - most)])
    found = fitted(min(k or MOST, most))
    distances = found.transform(vectors)[np.arange(len(texts)), found.labels_]
    means = [float(distances[found.labels_ == n].mean()) for n in range(found.n_clusters)]
    rest = 0.0
    if len(others) >= _FEWEST:
        rest = float(
            KMeans(1, n_init=1, random_state=0).fit_transform(method.transform(others)).mean()
        )
    return Clusters(found.labels_, distances, means, rest)
