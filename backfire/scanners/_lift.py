"""Which n-grams and pairs of words predict an answer too well: the counting behind `lift`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from backfire.scanners import _sketches
from backfire.scanners._answers import Answers, where
from backfire.scanners._grams import Batch, Grams, joined
from backfire.scanners._languages import Languages
from backfire.scanners._sketches import CountMin

Array = Any
MOST_CANDIDATES = 2**16
_WEAK = 3.0
"""In nats: n-grams below this bound on -ln(p) are not counted exactly."""
_MOST_PAIRED = 60
"""Words of a row whose pairs are counted."""
_PLAIN = 0.75
"""Weight of a word's bound against its plain share, without the odds."""


@dataclass(frozen=True)
class Occurrences:
    """N-grams or pairs of words in rows that have a frequent answer: parallel arrays."""

    row: Array
    gram: Array
    first: Array
    length: Array
    answer: Array
    pair: Array
    """Hash of the n-gram with the answer."""


def with_answers(batch: Batch, places: Array, keys: Array) -> Occurrences:
    """Every n-gram of the batch with each frequent answer of its row."""
    chosen, answers = [], []
    for way in range(len(places)):
        answer = places[way][batch.row]
        has = np.flatnonzero(answer >= 0)
        chosen.append(has)
        answers.append(answer[has])
    which, answer = np.concatenate(chosen), np.concatenate(answers)
    gram = batch.gram[which]
    pair = joined(gram, keys[answer]) if len(which) else gram
    return Occurrences(
        batch.row[which], gram, batch.first[which], batch.length[which], answer, pair
    )


@dataclass
class Candidates:
    """N-grams, each with an answer that it may predict too well: parallel arrays, sorted by
    `pair`."""

    pair: Array
    gram: Array
    answer: Array
    single: Array
    """Whether it is one token."""
    rows: Array = None
    """Rows with the n-gram [language, candidate]."""
    both: Array = None
    """Rows with the n-gram and the answer."""

    @property
    def with_it(self) -> Array:
        """Rows with the n-gram."""
        return self.rows.sum(0)

    def joined(self, more: Candidates) -> Candidates:
        """These candidates and others."""
        names = ("pair", "gram", "answer", "single", "rows", "both")
        return Candidates(
            **{n: np.concatenate([getattr(self, n), getattr(more, n)], axis=-1) for n in names}
        )


@dataclass(frozen=True)
class Frequencies:
    """How many n-grams and pairs of words are in many rows, whatever their answers are."""

    grams: Array
    """Number of n-grams in at least n rows, for n from 0."""
    words: Array
    """Number of words and signs likewise."""
    num_pairs: int
    """Pairs of words in a row, summed over the rows."""

    def grams_in(self, rows: Array) -> Array:
        """Number of n-grams in at least so many rows."""
        return _in_at_least(self.grams, rows)

    def pairs_in(self, rows: Array) -> Array:
        """Most pairs of words that can be in at least so many rows: both words are, and all pairs
        share the places that there are."""
        words = _in_at_least(self.words, rows)
        return np.minimum(words * (words - 1) // 2, self.num_pairs // np.maximum(rows, 1))


def _in_at_least(tails: Array, rows: Array) -> Array:
    return np.append(tails, 0)[np.minimum(rows, len(tails)).astype(np.int64)]


def find_candidates(
    grams: Grams, answers: Answers, odds: float, support: int
) -> tuple[Candidates, Frequencies]:
    """Two passes: counts of all n-grams in sketches, then the ones that stand out in them."""
    expected, num_grams, num_pairs = grams.count(_sketches.LARGEST // 2), 0, 0
    all_rows, both, words = CountMin(expected), CountMin(expected), CountMin(expected // 4)
    for batch in grams:
        num_grams += len(batch.gram)
        words.add(batch.gram[batch.length == 1])
        each = np.bincount(batch.row[batch.length == 1], minlength=1)
        num_pairs += int((each * (each - 1) // 2).sum())
        all_rows.add(batch.gram)
        both.add(with_answers(batch, answers.places(batch.answers), answers.keys).pair)
    share = answers.counts / answers.num_rows
    high = at_odds(share, odds)
    found: dict[str, list[Array]] = {name: [] for name in ("pair", "gram", "answer", "single", "s")}
    noise = num_grams >> all_rows.bits
    for batch in grams:
        here = with_answers(batch, answers.places(batch.answers), answers.keys)
        hits = both.count(here.pair).astype(float)
        total = np.maximum(all_rows.count(here.gram) - float(noise), hits)
        strength = bound(hits, total, high[here.answer])
        single = here.length == 1
        # A word of a combination predicts an answer only in part.
        alone = _PLAIN * bound(hits, total, share[here.answer])[single]
        strength[single] = np.maximum(strength[single], alone)
        kept = (hits >= support) & (strength >= _WEAK)
        values = (here.pair, here.gram, here.answer, single, strength)
        for name, value in zip(found, values, strict=True):
            found[name].append(value[kept])
        if len(found["s"]) > 20:
            _best(found)
    _best(found)
    one = {name: value[0] for name, value in found.items() if name != "s"}
    return Candidates(**one), Frequencies(all_rows.tails(), words.tails(), num_pairs)


def _best(found: dict[str, list[Array]]) -> None:
    """Merge the arrays, each pair once, and keep the strongest."""
    whole = {name: np.concatenate(value) for name, value in found.items()}
    _, first = np.unique(whole["pair"], return_index=True)
    if len(first) > MOST_CANDIDATES:
        strongest = np.argsort(-whole["s"][first], kind="stable")[:MOST_CANDIDATES]
        first = first[np.sort(strongest)]
    for name, value in whole.items():
        found[name] = [value[first]]


def bound(hits: Array, total: Array, rate: Array) -> Array:
    """Chernoff's bound on -ln P(at least `hits` of `total`) at this rate; 0 below the rate."""
    part = np.clip(hits / np.maximum(total, 1), 1e-12, 1 - 1e-12)
    rate = np.clip(rate, 1e-12, 1 - 1e-12)
    bits = part * np.log(part / rate) + (1 - part) * np.log((1 - part) / (1 - rate))
    return np.where(part > rate, total * bits, 0.0)


def at_odds(share: Array, odds: float) -> Array:
    """The share at so many times its odds."""
    return odds * share / (1 - share + odds * share)


def count_exactly(grams: Grams, answers: Answers, found: Candidates, languages: Languages) -> None:
    """One pass: the exact counts of all candidates, and of the answers in each language."""
    ordered, back = np.unique(found.gram, return_inverse=True)
    rows = np.zeros((languages.count, len(ordered)), np.int64)
    both = np.zeros(len(found.pair), np.int64)
    for batch in grams:
        answer, language = answers.places(batch.answers), languages.of(batch)
        languages.add(language, answer)
        places = where(ordered, batch.gram)
        hit = np.flatnonzero(places >= 0)
        flat = language[batch.row[hit]] * len(ordered) + places[hit]
        rows += np.bincount(flat, minlength=rows.size).reshape(rows.shape)
        here = with_answers(batch, answer, answers.keys)
        places = where(found.pair, here.pair)
        both += np.bincount(places[places >= 0], minlength=len(both))
    found.rows, found.both = rows[:, back], both


def pairs_of(batch: Batch, words: Array) -> Batch:
    """The pairs of these words (sorted hashes) in each row; `first` and `length` hold the places of
    both words. Of a row with more than 60 of the words, the pairs of the first 60 in the order of
    `words`, which is the same in all rows."""
    places = where(words, batch.gram)
    kept = np.flatnonzero((places >= 0) & (batch.length == 1))
    kept = kept[np.lexsort((places[kept], batch.row[kept]))]
    row, word, first = batch.row[kept], places[kept], batch.first[kept]
    sizes = np.bincount(row, minlength=len(batch.rows)) if len(row) else np.zeros(0, int)
    lefts, rights = list(_combinations(sizes))
    a, b = np.where(word[lefts] < word[rights], (lefts, rights), (rights, lefts))
    gram = joined(joined(words[word[a]], words[word[b]]), np.uint64(2))
    return Batch(batch.rows, batch.answers, row[a], gram, first[a], -first[b] - 1)


def _combinations(sizes: Array) -> Iterator[Array]:
    """Places of both sides of each pair within consecutive groups of these sizes."""
    lefts, rights, start = [np.zeros(0, int)], [np.zeros(0, int)], 0
    for size in sizes:
        if size > 1:
            left, right = np.triu_indices(min(int(size), _MOST_PAIRED), 1)
            lefts.append(left + start)
            rights.append(right + start)
        start += size
    yield np.concatenate(lefts)
    yield np.concatenate(rights)
