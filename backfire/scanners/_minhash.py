"""Finds an earlier text with nearly the same word n-grams, in bounded memory (MinHash: Broder 1997;
bands: Leskovec et al., Mining of Massive Datasets, chapter 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from backfire.base import NOTHING, Finding, Row
from backfire.base.normalize import folded
from backfire.scanners._grams import joined
from backfire.scanners._tokens import hashed, split

Array = Any
BANDS, ROWS = 32, 2
"""A pair with similarity J shares J^2 of the bands on average."""
_SLOTS = 2**17
"""For each band: the last text with each key is kept, 4 bytes for the key and 4 for its number."""
_LONGEST = 400
"""Words of a text that are compared, half from its start and half from its end."""
_RECENT = 2**18
"""Texts of which the hash of all words is kept, the last ones."""


class Keys(NamedTuple):
    """What a text is known by."""

    bands: Array
    """Hash of each band."""
    words: int
    """Hash of all its words and signs."""
    is_cut: bool
    """Whether its middle is not in the bands."""


class Like(NamedTuple):
    """An earlier text that resembles a text."""

    number: int
    """Its number, from 1; -1 if there is none."""
    similarity: float
    """The Jaccard similarity that the number of common bands suggests."""
    has_same_words: bool


def _text(row: Row, first: Row, *, answer: bool) -> tuple[str, str]:
    """The conversation of a row, without an instruction and a system prompt that are those of the
    first row: in a task with one instruction, they would make all rows alike. Then which of them
    are left out."""
    system = "" if row.system == first.system else row.system
    own = row.instruction if row.instruction != first.instruction or not row.input else ""
    turns = [turn.content for turn in row.history]
    text = "\n".join([system, *turns, own, row.input, *[row.answer] * answer])
    return text, f"{system != row.system} {own != row.instruction}"


def alike_to(what: str, other: str, like: Like, keys: Keys, least: float) -> Finding:
    """What is found in a row that is so similar to another; nothing below half of the threshold."""
    alike = like.similarity
    if alike < least / 2:
        return NOTHING
    where = ", compared in its first and last 200 words" * keys.is_cut
    if like.has_same_words:
        reason = f"{what} has the same words as {other} (counted from 1)"
    elif alike == 1:
        sampled = "nearly all of the word n-grams that were sampled"
        reason = f"{what} shares {sampled} with {other} (counted from 1{where})"
    else:
        near = f"Jaccard similarity about {alike:.2f}{where}"
        reason = f"{what} shares many word n-grams with {other} ({near}; counted from 1)"
    return Finding(alike / least + 0.2 * like.has_same_words, reason, alike >= least)


class Earlier:
    """The texts seen so far, as far as they are kept: 36 MB. An older text may be overwritten by a
    newer one; half of the texts that are 90,000 back are still known."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._keys = np.zeros((BANDS, _SLOTS), np.uint32)
        self._numbers = np.full((BANDS, _SLOTS), -1, np.int32)
        self._words_of = np.zeros(_RECENT, np.uint64)
        self._first: Row | None = None
        draw = np.random.default_rng(0)
        self._odd = draw.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)

    def each(self, rows: Iterable[Row], *, answer: bool = False) -> Iterator[tuple[int, Keys]]:
        """The number of each row, from 1, and the keys of its prompt, with its answer if wanted; of
        a plain text, those of the text. Two sets that are compared are read by one object, so that
        the same parts of both are left out."""
        stream, number = iter(rows), 0
        while some := list(islice(stream, 1000)):
            first = self._first = self._first or some[0]
            plain = [answer or not row.conversation.strip() for row in some]
            texts = [_text(row, first, answer=is_plain) for row, is_plain in zip(some, plain)]
            words = [split(folded(text)) for text, _ in texts]
            hashes = [hashed(f"{left_out} {' '.join(w)}") for w, (_, left_out) in zip(words, texts)]
            cut = [len(one) > _LONGEST for one in words]
            yield from enumerate(map(Keys, self._bands(words), hashes, cut), number + 1)
            number += len(some)

    def _bands(self, texts: Sequence[list[str]]) -> Array:
        """The keys of each text [text, band]."""
        lists = [self._grams(text) for text in texts]
        sizes = np.array([len(one) for one in lists])
        flat = np.concatenate(lists)
        starts = np.cumsum(sizes) - sizes
        keys = np.zeros((len(texts), BANDS), np.uint64)
        for place, odd in enumerate(self._odd):
            mixed = flat * odd
            mixed ^= mixed >> np.uint64(31)
            least = np.minimum.reduceat(mixed * np.uint64(0x9E3779B97F4A7C15), starts)
            keys[:, place // ROWS] = joined(keys[:, place // ROWS], least)
        return keys

    def _grams(self, words: list[str]) -> Array:
        if len(words) > _LONGEST:
            words = [*words[: _LONGEST // 2], *words[-_LONGEST // 2 :]]
        found = np.array([hashed(word) for word in words] or [0], np.uint64)
        n = min(self._words, len(found))
        gram = found[: len(found) - n + 1]
        for more in range(1, n):
            gram = joined(gram, found[more : len(found) - n + 1 + more])
        return gram

    def nearest(self, keys: Keys) -> Like:
        """The earlier text with most bands in common."""
        slots, short = self._places(keys.bands)
        bands = np.arange(BANDS)
        same = (self._keys[bands, slots] == short) & (self._numbers[bands, slots] >= 0)
        if not same.any():
            return Like(-1, 0.0, has_same_words=False)
        numbers, counts = np.unique(self._numbers[bands, slots][same], return_counts=True)
        best = int(np.argmax(counts))
        number = int(numbers[best])
        if int(self._words_of[number % _RECENT]) == keys.words:
            return Like(number, 1.0, has_same_words=True)  # whatever overwrote some of its bands
        return Like(number, float(np.sqrt(counts[best] / BANDS)), has_same_words=False)

    def add(self, keys: Keys, number: int) -> None:
        slots, short = self._places(keys.bands)
        bands = np.arange(BANDS)
        self._keys[bands, slots] = short
        self._numbers[bands, slots] = number
        self._words_of[number % _RECENT] = keys.words

    def _places(self, keys: Array) -> tuple[Array, Array]:
        slots = (keys >> np.uint64(47)).astype(np.int64)
        return slots, (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
