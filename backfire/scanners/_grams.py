"""The n-grams of rows as hashes in arrays.

Tokens include the edges of the parts of a prompt, so that an n-gram with an edge says where it
stands. Hashes have 64 bits: in a million rows, two n-grams share one with a chance below one in ten
thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from backfire.base import Row
from backfire.scanners._answers import keys_of
from backfire.scanners._tokens import hashed, tokens

Array = Any
"""A numpy array."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
_TURN = np.uint64(29)
_MOST_CACHED = 2**18
_BATCH = 1000
_KEPT = 2**22
"""N-grams whose hashes are kept from one pass to the next, if there are no more: 75 MB."""


@dataclass(frozen=True)
class Batch:
    """Some rows, and the different n-grams of each: parallel arrays, ordered by row."""

    rows: Sequence[Row]
    answers: Array
    """Keys of the answers [way, row]."""
    row: Array
    """Place of the row in the batch."""
    gram: Array
    """Hash of the n-gram."""
    first: Array
    """Its first token in the row."""
    length: Array
    """Its number of tokens."""


class Grams:
    """The n-grams of rows, batch by batch, any number of times; few are kept in memory."""

    def __init__(self, rows: Iterable[Row], longest: int, most: int) -> None:
        self._rows, self._longest, self._most = rows, longest, most
        self._cache: dict[str, int] = {}
        self._kept: list[Batch] | None = None
        self._are_few = True

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Batch] = []
        size = 0
        for batch in self._batches():
            size += len(batch.gram)
            self._are_few = self._are_few and size <= _KEPT
            if self._are_few:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        self._kept = kept if self._are_few else None

    def count(self, most: int) -> int:
        """Number of different n-grams of each row, summed over the rows; counting ends once there
        are more than `most`."""
        total = 0
        for batch in self:
            total += len(batch.gram)
            if total > most:
                break
        return total

    def _batches(self) -> Iterator[Batch]:
        rows = iter(self._rows)
        while some := list(islice(rows, _BATCH)):
            lists = [self._hashes(tokens(row, self._most)) for row in some]
            sizes = np.array([len(one) for one in lists])
            flat = np.fromiter((h for one in lists for h in one), np.uint64, int(sizes.sum()))
            yield _batch(some, keys_of(some), flat, sizes, self._longest)

    def _hashes(self, found: list[str]) -> list[int]:
        cache = self._cache
        if len(cache) > _MOST_CACHED:
            cache.clear()
        out = []
        for token in found:
            value = cache.get(token)
            if value is None:
                value = cache[token] = hashed(token)
            out.append(value)
        return out


def _batch(rows: Sequence[Row], answers: Array, flat: Array, sizes: Array, longest: int) -> Batch:
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)
    starts = np.cumsum(sizes) - sizes
    inside = np.arange(len(flat), dtype=np.int32) - np.repeat(starts, sizes).astype(np.int32)
    grams, owners, firsts, lengths = [flat], [owner], [inside], [np.ones(len(flat), np.int8)]
    gram = flat
    for n in range(2, longest + 1):
        gram = joined(gram[:-1], flat[n - 1 :])
        own = owner[: len(gram)] == owner[n - 1 :]
        grams.append(gram[own])
        owners.append(owner[: len(gram)][own])
        firsts.append(inside[: len(gram)][own])
        lengths.append(np.full(int(own.sum()), n, np.int8))
    gram, owner = np.concatenate(grams), np.concatenate(owners)
    first, length = np.concatenate(firsts), np.concatenate(lengths)
    _, kept = np.unique(joined(gram, owner.astype(np.uint64)), return_index=True)
    kept = kept[np.argsort(owner[kept], kind="stable")]
    return Batch(rows, answers, owner[kept], gram[kept], first[kept], length[kept])


def joined(a: Array, b: Array) -> Array:
    """One hash of two, in this order."""
    mixed = a * _MIX + (b ^ (b >> _TURN))
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX
    mixed ^= mixed >> _TURN
    return mixed
