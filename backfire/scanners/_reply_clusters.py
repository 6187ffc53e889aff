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


def clusters_of(texts: Sequence[str], others: Sequence[str], most: int, each: int) -> Clusters:
    """Clusters of some texts by TF-IDF, beside other texts: at most so many, and so few that each
    has on average so many different texts, else all would be tight; but at least 2."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    method = TfidfVectorizer(analyzer=lambda text: words(text.casefold())).fit([*texts, *others])
    vectors = method.transform(texts)
    vectors.sort_indices()
    different = len({(*row.indices, *row.data.round(6)) for row in vectors})
    count = min(max(2, min(most, different // each)), different)
    found = KMeans(count, n_init=10, max_iter=600, tol=1e-5, random_state=0)
    distances = found.fit_transform(vectors)[np.arange(len(texts)), found.labels_]
    means = [float(distances[found.labels_ == n].mean()) for n in range(found.n_clusters)]
    rest = 0.0
    if len(others) >= _FEWEST:
        rest = float(
            KMeans(1, n_init=1, random_state=0).fit_transform(method.transform(others)).mean()
        )
    return Clusters(found.labels_, distances, means, rest)
