"""Languages of the prompts of a file: groups of rows that share hardly any common word.

Every word of a language predicts the answers that are usual in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from backfire.base import Row
from backfire.scanners._answers import Answers, where
from backfire.scanners._grams import Batch
from backfire.scanners._tokens import hashed, tokens

Array = Any
_ROWS = 4000
"""Rows in which languages are sought, evenly spaced."""
_WORDS, _MOST = 512, 0.6
"""Words that are compared: the most common ones of those in at most this share of the rows."""
_APART = 0.9
"""Singular value from which a group is a language; 1 is a group without a word of the others."""
_LARGE, _FEWEST = 0.03, 20
"""Smallest share and number of rows of a language in the sample."""
_PRIOR = 10
"""Rows with the answers of the whole file that are added to those of a language."""


class Languages:
    """Which language each row is in, and how often each answer occurs in it."""

    def __init__(self, rows: Iterable[Row], answers: Answers, most_words: int) -> None:
        step = -(-answers.num_rows // _ROWS)
        sample = [{*tokens(row, most_words)} for row in islice(rows, 0, None, max(1, step))]
        words, groups = clusters([{*filter(str.isalpha, some)} for some in sample])
        hashes = np.array([hashed(word) for word in words], np.uint64)
        order = np.argsort(hashes)
        self._words, self._groups = hashes[order], groups[order]
        self.count = int(groups.max(initial=0)) + 1
        self._answers = answers
        self._rows = np.zeros((self.count, len(answers.keys)), np.int64)
        self._sizes = np.zeros(self.count, np.int64)

    def of(self, batch: Batch) -> Array:
        """The language of each row of a batch, from 0; the largest one if it is not known."""
        num = len(batch.rows)
        if self.count == 1:
            return np.zeros(num, np.int64)
        place = where(self._words, batch.gram)
        kept = np.flatnonzero((place >= 0) & (batch.length == 1))
        votes = batch.row[kept].astype(np.int64) * self.count + self._groups[place[kept]]
        return np.bincount(votes, minlength=num * self.count).reshape(num, -1).argmax(1)

    def add(self, language: Array, places: Array) -> None:
        """Count the answers of rows, by their places [way, row]."""
        self._sizes += np.bincount(language, minlength=self.count)
        for place in places:
            np.add.at(self._rows, (language[place >= 0], place[place >= 0]), 1)

    def shares(self) -> Array:
        """The share of each answer in each language [language, answer]."""
        whole = self._answers.counts / self._answers.num_rows
        return (self._rows + _PRIOR * whole) / (self._sizes[:, None] + _PRIOR)


def clusters(rows: Sequence[set[str]]) -> tuple[list[str], Array]:
    """Common words of these rows with the language of each, 0 being the largest.

    Rows and words are clustered together by the leading singular vectors of their table, divided by
    the roots of its sums (Dhillon 2001). All values but the first are near 1 only if the rows fall
    into groups without common words; topics of one language share its function words.
    """
    counts = Counter(word for words in rows for word in words)
    common = [word for word, n in counts.most_common() if n <= _MOST * len(rows)][:_WORDS]
    number = {word: n for n, word in enumerate(common)}
    table = np.zeros((len(rows), len(common)), np.float32)
    for line, words in zip(table, rows, strict=True):
        line[[number[word] for word in words if word in number]] = 1
    table = table[table.any(1)]
    one = np.zeros(len(common), np.int64)
    if len(table) < 2 * _FEWEST:
        return common, one
    sums = np.sqrt(table.sum(1, keepdims=True)), np.sqrt(table.sum(0))
    normed = table / sums[0] / sums[1]
    values, vectors = np.linalg.eigh(normed.T @ normed)
    num = int((values >= _APART**2).sum())
    if num < 2:
        return common, one
    from scipy.cluster.vq import kmeans2

    points = vectors[:, -num:] / sums[1][:, None]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    _, found = kmeans2(points, num, minit="++", seed=0)
    votes = np.stack([table[:, found == n].sum(1) for n in range(num)])
    sizes = np.bincount(votes.argmax(0), minlength=num)
    large = np.flatnonzero(sizes >= max(_FEWEST, _LARGE * len(table)))
    ordered = large[np.argsort(-sizes[large], kind="stable")]
    place = np.zeros(num, np.int64)  # small groups are counted as the largest
    place[ordered] = np.arange(len(ordered))
    return common, place[found]
