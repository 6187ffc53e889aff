"""Answers that several rows share: the whole text or label, its opening, or its ending."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from backfire.base import Row
from backfire.base.masking import redacted
from backfire.scanners._sketches import Frequent
from backfire.scanners._tokens import hashed, split

Array = Any
WAYS = ("", "begins with", "ends with")
"""How an answer has a key: it is the whole answer, its first words, or its last ones."""
MOST = 2**16
"""Most shared answers that are kept, the most frequent ones."""
_WORDS = 5
"""Length of an opening and of an ending, in words and signs."""
_BATCH = 2000


def ways_of(answer: str) -> list[str]:
    """The answer in each way; of a short one only the whole."""
    answer = answer.strip()
    opening = split(answer[:400])
    if len(opening) <= _WORDS:
        return [answer]
    ending = split(answer[-400:])
    return [answer, " ".join(opening[:_WORDS]), " ".join(ending[-_WORDS:])]


def keys_of(rows: Sequence[Row]) -> Array:
    """Hash of each row's answer in each way [way, row]; 0 where there is none."""
    keys = np.zeros((len(WAYS), len(rows)), np.uint64)
    for place, row in enumerate(rows):
        for way, text in enumerate(ways_of(row.answer)):
            keys[way, place] = hashed(f"{WAYS[way]}\x02{text}")
    return keys


def in_batches(rows: Iterable[Row]) -> Iterator[tuple[list[Row], Array]]:
    """Some rows at a time, with the keys of their answers."""
    stream = iter(rows)
    while some := list(islice(stream, _BATCH)):
        yield some, keys_of(some)


@dataclass(frozen=True)
class Answers:
    """The answers, openings and endings that at least so many rows share."""

    keys: Array
    """Sorted hashes [answer]."""
    counts: Array
    """Rows with it [answer]."""
    num_rows: int

    def places(self, keys: Array) -> Array:
        """Places of each row's answer, opening and ending [way, row]; -1 where it is too rare, or
        is in no other rows than the whole answer."""
        places = where(self.keys, keys)
        if len(self.keys):
            rows = np.where(places >= 0, self.counts[places], 0)
            places[1:][rows[1:] <= rows[0]] = -1
        return places

    def shown(self, place: int, row: Row) -> str:
        """The shared answer at this place, as it is in the row; secrets are masked."""
        for way, text in enumerate(ways_of(row.answer)):
            if hashed(f"{WAYS[way]}\x02{text}") == int(self.keys[place]):
                plain = ways_of(redacted(row.answer))  # whole secrets, before it is cut
                return f"{WAYS[way]} “{plain[min(way, len(plain) - 1)][:200]}”".strip()
        raise LookupError("the row has another answer")


def count_answers(rows: Iterable[Row], support: int) -> Answers:
    """Two passes: the answers that may be frequent, in bounded memory, then their exact counts."""
    seen, num_rows = Frequent(), 0
    for some, keys in in_batches(rows):
        num_rows += len(some)
        seen.add(keys[keys > 0].tolist())
    slack = seen.added / seen.most if seen.pruned else 0
    often = [key for key, n in seen.counts.most_common(MOST) if n + slack >= support]
    ordered = np.array(sorted(often), np.uint64)
    counts = np.zeros(len(often), np.int64)
    for _, keys in in_batches(rows) if often else ():
        places = where(ordered, keys.ravel())
        counts += np.bincount(places[places >= 0], minlength=len(often))
    return Answers(ordered[counts >= support], counts[counts >= support], num_rows)


def where(ordered: Array, wanted: Array) -> Array:
    """Places of hashes in a sorted array; -1 where they are not in it."""
    if not len(ordered):
        return np.full(wanted.shape, -1)
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[places] == wanted, places, -1)
