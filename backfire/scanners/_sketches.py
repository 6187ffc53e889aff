"""Counts in bounded memory, with stated errors, for files of any length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
LARGEST = 2**22
"""Most cells of a table; two tables of two rows take 64 MB."""


class Frequent:
    """The most frequent keys of a stream (Misra and Gries 1982), with at most 2 x `most` counters.

    A key's count is too low by at most (number of keys added) / `most`.
    """

    def __init__(self, most: int = 2**16) -> None:
        self.most = most
        self.counts: Counter[int] = Counter()
        self.added = 0
        self.pruned = False
        """Whether counts are too low."""

    def add(self, keys: Sequence[int]) -> None:
        """Add keys; at most as many at a time as there are counters."""
        self.counts.update(keys)
        self.added += len(keys)
        if len(self.counts) > 2 * self.most:
            self.pruned = True
            less = sorted(self.counts.values(), reverse=True)[self.most]
            self.counts = Counter(
                {key: count - less for key, count in self.counts.items() if count > less}
            )


class CountMin:
    """Counts of 64-bit hashes (Cormode and Muthukrishnan 2005), in two rows of cells.

    A count is never too low. It is too high by more than 2.7 x (number of hashes added) / cells
    with a chance of at most 14 % for each hash. That is zero for most hashes if there are more
    cells than different hashes.
    """

    def __init__(self, expected: int) -> None:
        self.bits = min(int(LARGEST).bit_length() - 1, max(10, int(2 * expected).bit_length()))
        self._cells = np.zeros((2, 1 << self.bits), np.uint32)

    def add(self, hashes: Array) -> None:
        for row, places in zip(self._cells, self._places(hashes), strict=True):
            if len(places) * 8 < len(row):
                np.add.at(row, places, np.uint32(1))
            else:
                row += np.bincount(places, minlength=len(row)).astype(np.uint32)

    def count(self, hashes: Array) -> Array:
        a, b = self._places(hashes)
        return np.minimum(self._cells[0][a], self._cells[1][b])

    def tails(self) -> Array:
        """About how many different hashes have at least n, for each n from 0; never too few by more
        than those that share a cell."""
        sizes = [np.bincount(row) for row in self._cells]
        longest = max(map(len, sizes))
        each = [np.pad(size, (0, longest - len(size))) for size in sizes]
        return np.stack([size[::-1].cumsum()[::-1] for size in each]).min(0)

    def _places(self, hashes: Array) -> tuple[Array, Array]:
        shift = np.uint64(64 - self.bits)
        low = hashes * np.uint64(0xD6E8FEB86659FD93)
        return (hashes >> shift).astype(np.int64), (low >> shift).astype(np.int64)
