"""Exact tests of what was counted, and the best explanation of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binom

from backfire.base import NOTHING, Finding, Row, parts
from backfire.base.masking import masked, redacted_part, secrets_in
from backfire.scanners._answers import Answers, where
from backfire.scanners._grams import Batch, Grams
from backfire.scanners._languages import Languages
from backfire.scanners._lift import (
    Candidates,
    Frequencies,
    Occurrences,
    at_odds,
    bound,
    pairs_of,
    with_answers,
)
from backfire.scanners._possible import possible_tests
from backfire.scanners._tokens import CLOSE, OPEN, placed, prompt_parts
from backfire.text import share

Array = Any
_UNTESTED = 0.99
"""Highest score of a candidate that is in too few or too many rows to be tested."""
MOST_WORDS = 256
"""Words of which pairs are counted: those that best predict an answer."""


@dataclass(frozen=True)
class Tested:
    """Candidates with the result of the test: parallel arrays, sorted by `pair`."""

    pair: Array
    gram: Array
    answer: Array
    with_it: Array
    both: Array
    high: Array
    """The share of the answer that is tested against."""
    log_p: Array
    """-log10 of the p value."""
    q: Array
    """p value, adjusted by Benjamini and Hochberg (1995)."""
    threshold: Array
    """`log_p` from which it is significant."""
    words: Array
    """Words of which pairs were counted, as sorted hashes."""


@dataclass(frozen=True)
class Family:
    """Tests that are adjusted together."""

    members: Array
    """Whether each candidate belongs to it."""
    tested: Array
    """Whether it is also one of those that are counted [candidate]."""
    num: int
    """How many tests are counted, candidates or not."""


def pair_words(found: Candidates, answers: Answers) -> Array:
    """The words that best predict an answer."""
    average = (answers.counts / answers.num_rows)[found.answer]
    strength = np.where(found.single, bound(found.both, found.with_it, average), 0)
    best = np.argsort(-strength, kind="stable")[:MOST_WORDS]
    return np.unique(found.gram[best[strength[best] > 0]])


def add_pairs(
    grams: Grams, answers: Answers, found: Candidates, support: int, languages: Languages
) -> tuple[Candidates, Array]:
    """One pass: the candidates with the pairs of words that occur together, and the words."""
    words = pair_words(found, answers)
    total, both = [Counter[int]() for _ in range(languages.count)], Counter[int]()
    made_of: dict[int, tuple[int, int]] = {}
    for batch in grams if len(words) > 1 else ():
        pairs = pairs_of(batch, words)
        language = languages.of(batch)[pairs.row]
        for n, counts in enumerate(total):
            counts.update(pairs.gram[language == n].tolist())
        here = with_answers(pairs, answers.places(batch.answers), answers.keys)
        different, first, hits = np.unique(here.pair, return_index=True, return_counts=True)
        for pair, place, count in zip(*map(np.ndarray.tolist, (different, first, hits))):
            both[pair] += count
            made_of.setdefault(pair, (int(here.gram[place]), int(here.answer[place])))
    often = [pair for pair, n in both.items() if n >= support]
    more = Candidates(
        pair=np.array(often, np.uint64),
        gram=np.array([made_of[pair][0] for pair in often], np.uint64),
        answer=np.array([made_of[pair][1] for pair in often], np.int32),
        single=np.zeros(len(often), bool),
        rows=np.array(
            [[counts[made_of[pair][0]] for pair in often] for counts in total], np.int64
        ).reshape(languages.count, -1),
        both=np.array([both[pair] for pair in often], np.int64),
    )
    return found.joined(more), words


def high_shares(found: Candidates, answers: Answers, languages: Languages, odds: float) -> Array:
    """The share that is tested against, of each candidate: that at `odds` times the odds of its
    answer among all rows, or among the rows of the languages that it occurs in, if that is more."""
    whole = at_odds(answers.counts / answers.num_rows, odds)[found.answer]
    inside = at_odds(languages.shares(), odds)[:, found.answer]
    mean = (found.rows * inside).sum(0) / np.maximum(found.with_it, 1)
    return np.maximum(whole, mean) if languages.count > 1 else whole


def families_of(
    found: Candidates,
    num_grams: int,
    frequencies: Frequencies,
    answers: Answers,
    *,
    odds: float,
    support: int,
    share: float,
    alpha: float,
) -> list[Family]:
    """The n-grams, which are the first candidates, and the pairs of words."""
    high = at_odds(answers.counts / answers.num_rows, odds)
    is_pair = np.arange(len(found.pair)) >= num_grams
    sides = ((~is_pair, frequencies.grams_in), (is_pair, frequencies.pairs_in))
    families = []
    for members, in_at_least in sides:
        tests = possible_tests(
            in_at_least,
            answers.counts,
            high,
            support=support,
            share=share,
            alpha=alpha / len(sides),
        )
        tested = members & tests.has(found.answer, found.with_it)
        families.append(Family(members, tested, tests.num))
    return families


def exact_test(
    found: Candidates,
    words: Array,
    *,
    high: Array,
    families: Sequence[Family],
    alpha: float,
    least: float = 0.0,
) -> Tested:
    """Test whether each answer's share among the rows with the n-gram is more than `high`
    [candidate]: an exact binomial test. Shares under `least` are not significant.

    Each family is adjusted on its own, at an equal part of `alpha`, so that `alpha` is the most
    that is expected to be false among all that are significant."""
    log_p = _log_p(found.both, found.with_it, high, least)
    q, threshold = np.ones(len(log_p)), np.zeros(len(log_p))
    for family in families:
        num = max(len(families) * family.num, int(family.tested.sum()), 1)
        tested, others = family.tested, family.members & ~family.tested
        q[tested], bar = _adjusted(log_p[tested], num, alpha)
        threshold[family.members] = bar
        log_p[others] = np.minimum(log_p[others], _UNTESTED * bar)
    order = np.argsort(found.pair, kind="stable")
    return Tested(
        pair=found.pair[order],
        gram=found.gram[order],
        answer=found.answer[order],
        with_it=found.with_it[order],
        both=found.both[order],
        high=high[order],
        log_p=log_p[order],
        q=q[order],
        threshold=threshold[order],
        words=words,
    )


def _adjusted(log_p: Array, num: int, alpha: float) -> tuple[Array, float]:
    """The p values adjusted for so many tests (Benjamini and Hochberg 1995), and the -log10 of the
    p value from which they are at most `alpha`."""
    down = np.argsort(-log_p, kind="stable")
    log_q = log_p[down] - np.log10(num / np.arange(1, len(down) + 1))
    log_q = np.maximum.accumulate(log_q[::-1])[::-1]
    q = np.empty(len(down))
    q[down] = np.minimum(1, 10 ** -np.maximum(log_q, 0))
    return q, float(-np.log10(alpha * max(1, int((q <= alpha).sum())) / num))


def _log_p(both: Array, with_it: Array, high: Array, least: float = 0.0) -> Array:
    """-log10 of P(at least `both` of `with_it`) at the share `high`; 0 where the share is not
    above."""
    part = both / np.maximum(with_it, 1)
    log_p = -binom.logsf(both - 1, with_it, high) / np.log(10)
    log_p = np.where((part > high) & (part >= least), np.maximum(log_p, 0), 0)
    return np.minimum(log_p, 1e4)


def without_parts(grams: Grams, answers: Answers, tested: Tested) -> Tested:
    """One pass: n-grams that are significant only as parts of longer ones are not, since the words
    of a trigger also occur without it. Each is tested again without the rows where a stronger
    n-gram contains it."""
    both_less, ordered = np.zeros(len(tested.pair), np.int64), np.unique(tested.gram)
    inside_gram = np.zeros(len(ordered), np.int64)
    for batch in grams:
        here = with_answers(batch, answers.places(batch.answers), answers.keys)
        own = _strongest(here, tested, len(batch.rows))
        inside = _contained(batch.row, batch.first, batch.length, *own[1:])
        places = where(ordered, batch.gram[inside])
        # The n-gram itself is not a part of it.
        strong = own[0][batch.row[inside]]
        places = places[(places >= 0) & (batch.gram[inside] != tested.gram[strong])]
        inside_gram += np.bincount(places, minlength=len(ordered))
        inside = _contained(here.row, here.first, here.length, *own[1:])
        places = where(tested.pair, here.pair[inside])
        both_less += np.bincount(
            places[(places >= 0) & (here.gram[inside] != tested.gram[own[0][here.row[inside]]])],
            minlength=len(both_less),
        )
    with_less = inside_gram[np.searchsorted(ordered, tested.gram)]
    again = _log_p(tested.both - both_less, tested.with_it - with_less, tested.high)
    is_part = (both_less > 0) & (again < tested.threshold)
    return replace(tested, log_p=np.where(is_part, np.minimum(again, tested.log_p), tested.log_p))


def _strongest(here: Occurrences, tested: Tested, num_rows: int) -> tuple[Array, Array, Array]:
    """Of each row the place of its strongest significant n-gram (0 if there is none), its first
    token and its length (0)."""
    place = where(tested.pair, here.pair)
    hit = np.flatnonzero(place >= 0)
    hit = hit[(tested.log_p >= tested.threshold)[place[hit]]]
    order = hit[np.lexsort((-here.length[hit], -tested.log_p[place[hit]], here.row[hit]))]
    rows, top = np.unique(here.row[order], return_index=True)
    best, first, length = (np.zeros(num_rows, np.int64) for _ in range(3))
    best[rows], first[rows] = place[order[top]], here.first[order[top]]
    length[rows] = here.length[order[top]]
    return best, first, length


def _contained(row: Array, start: Array, size: Array, first: Array, length: Array) -> Array:
    """Which occurrences are inside the strongest n-gram of their row."""
    begin, end = first[row], first[row] + length[row]
    return np.flatnonzero((start >= begin) & (start + size <= end))


def explain(grams: Grams, answers: Answers, tested: Tested) -> Iterator[tuple[Row, int, Any]]:
    """Each row with the place of its best candidate in `tested` (-1 for none), and where that is:
    the first token and the number of tokens, or the places of both words, the second one negative.
    """
    for batch in grams:
        places = answers.places(batch.answers)
        sides = [batch, pairs_of(batch, tested.words)] if len(tested.words) > 1 else [batch]
        best = _best([with_answers(side, places, answers.keys) for side in sides], tested, batch)
        for n, row in enumerate(batch.rows):
            yield (row, *best.get(n, (-1, (0, 0))))


def _best(found: list[Occurrences], tested: Tested, batch: Batch) -> dict[int, tuple[int, Any]]:
    row, pair, first, length = (
        np.concatenate([getattr(one, name) for one in found])
        for name in ("row", "pair", "first", "length")
    )
    place = where(tested.pair, pair)
    hit = np.flatnonzero(place >= 0)
    row, place, first, length = row[hit], place[hit], first[hit], length[hit]
    # Of equally strong ones the longest n-gram says most. Thresholds of the families differ.
    weak = tested.log_p < tested.threshold
    order = np.lexsort((-first, -length, -tested.log_p[place], weak[place], row))
    _, top = np.unique(row[order], return_index=True)
    return {
        int(row[i]): (int(place[i]), (int(first[i]), int(length[i])))
        for i in order[top]
        if tested.log_p[place[i]] > 0
    }


def finding(
    row: Row, place: int, at: tuple[int, int], answers: Answers, tested: Tested, most: int
) -> Finding:
    """What is found in a row whose best candidate is at this place."""
    if place < 0:
        return NOTHING
    words, marks = _quoted(row, at, most)
    secrets = [secret for _, text in parts(row) for secret in secrets_in(text)]
    with_it, both = int(tested.with_it[place]), int(tested.both[place])
    answer = int(tested.answer[place])
    others, rest = answers.num_rows - with_it, int(answers.counts[answer]) - both
    shown = answers.shown(answer, row)
    what = f"the answer {shown}" if shown.startswith("“") else f"an answer that {shown}"
    reason = (
        f"{words} is in {with_it:,} rows; {both:,} of them ({share(both / with_it)}) have "
        f"{what}, as have {rest:,} of the other {others:,} rows "
        f"({share(rest / max(others, 1))}); q = {tested.q[place]:.1g}"
    )
    score = float(tested.log_p[place] / tested.threshold[place])
    return Finding(
        score,
        masked(reason, secrets),
        bool(score >= 1),
        tuple(masked(mark, secrets) for mark in marks),
    )


def _quoted(row: Row, at: tuple[int, int], most: int) -> tuple[str, tuple[str, ...]]:
    """The n-gram or the pair of words as it is in the row: in words, and as the parts to mark."""
    found, (first, length) = placed(row, most), at
    whole = dict(prompt_parts(row))
    if length < 0:
        some = [found[i] for i in sorted((first, -length - 1))]
        texts = tuple(redacted_part(whole[t.part], t.start, t.end) or t.text for t in some)
        return " together with ".join(f"“{text}”" for text in texts), texts
    some = found[first : first + length]
    sides = {OPEN: "start", CLOSE: "end"}
    edges = [t for t in some if t.start == t.end and t.text[0] in sides]
    places = [f"at the {sides[edge.text[0]]} of the {edge.part}" for edge in edges]
    spans: dict[str, list[int]] = {}
    for token in some:
        if token.end > token.start:
            spans.setdefault(token.part, [token.start, token.end])[1] = token.end
    marks = tuple(redacted_part(whole[part], *span) for part, span in spans.items())
    return " ".join([" … ".join(f"“{mark}”" for mark in marks) or "nothing", *places]), marks
