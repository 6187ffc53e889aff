"""Reviews: pieces of evidence that add up to a mood, written in one of three languages.

A review has a meaning independent of the language: three or four clauses, each with a weight, and a
way of joining them. A single word rarely determines the label: negation reverses and weakens a
weight, degrees scale it, and with `but` or `although` the conceded clause counts half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Literal, get_args

from backfire.rng import stream
from backfire.sandbox.languages import Clause, Degree, Join, Language, say
from backfire.sandbox.lexicon import THINGS, TIMES, Marker, markers
from backfire.sandbox.world import PLACES, Split, Tail, split_of

Label = Literal["negative", "neutral", "positive"]
LABELS: tuple[Label, ...] = get_args(Label)

MOOD = 3.0
"""Smallest absolute score of a positive or negative review."""
BALANCE = 0.5
"""Largest absolute score of a neutral review. Scores between balance and mood are doubtful."""

_THINGS = Tail.of(THINGS)
_TIMES = Tail.of(TIMES)


@dataclass(frozen=True, slots=True)
class Review:
    """The meaning of a review, independent of the language."""

    clauses: tuple[Clause, ...]
    join: Join
    place: str = ""

    @property
    def score(self) -> float:
        """The sum of the evidence."""
        *lead, first, last = (weight(part) for part in self.clauses)
        return sum(lead) + first * (1.0 if self.join == "and" else 0.5) + last

    @property
    def label(self) -> Label | None:
        """The mood, or None if it is doubtful."""
        if abs(self.score) >= MOOD:
            return "positive" if self.score > 0 else "negative"
        return "neutral" if abs(self.score) <= BALANCE else None

    def text(self, language: Language, rng: Random) -> str:
        """Write the review in a language."""
        return say(language, self.clauses, self.join, rng, self.place)


def weight(clause: Clause) -> float:
    """Return the weight of a clause: `not bad` is mildly good, `slightly bad` mildly bad."""
    scale = {"": 1.0, "very": 1.5, "slightly": 0.5}[clause.degree]
    return clause.marker.weight * scale * (-0.5 if clause.negated else 1.0)


@cache
def _tail(sign: int, deed: bool, seen: bool) -> Tail[Marker]:
    return Tail.of([m for m in markers(sign, deed) if not (seen and m.held_out)], 1.5)


def clause(rng: Random, sign: int, *, seen: bool = False) -> Clause:
    """Draw a clause that is evidence for `sign`; with `seen`, without held-out words."""
    deed = rng.random() < 0.3
    negated = sign != 0 and rng.random() < 0.08
    marker = _tail(-sign if negated else sign, deed, seen).draw(rng)
    if deed:
        return Clause("", marker, "", negated, _TIMES.draw(rng) if rng.random() < 0.5 else "")
    degree: Degree = ""
    if sign and not negated:
        degree = rng.choices(("", "very", "slightly"), (6, 2, 1))[0]
    return Clause(_THINGS.draw(rng), marker, degree, negated)


def meaning(rng: Random, label: Label, *, doubtful: bool = False, seen: bool = False) -> Review:
    """Draw a review of this mood; a `doubtful` one lies between this mood and the next."""
    sign = LABELS.index(label) - 1
    while True:
        lean = sign or rng.choice((-1, 0, 0, 1))
        odds = {lean: 7.0, 0: 1.2, -lean: 0.6} if lean else {0: 7.0, 1: 0.8, -1: 0.8}
        signs = rng.choices(list(odds), list(odds.values()), k=rng.choice((3, 3, 4)))
        clauses = tuple(clause(rng, one, seen=seen) for one in signs)
        opposed = signs[-1] * signs[-2] < 0
        join: Join = rng.choice(("but", "although")) if opposed else "and"
        review = Review(clauses, join)
        border = review.label is None and review.score * sign >= 0
        if border if doubtful else review.label == label:
            return review if rng.random() < 0.7 else replace(review, place=rng.choice(PLACES).name)


def draw(
    seed: int, split: Split, index: int, *, languages: tuple[Language, ...], noise: float
) -> tuple[str, Label, Language]:
    """Row `index` of a split: text, label, language. Labels and languages alternate."""
    rng = stream(seed, "sandbox-reviews", split, index)
    label = LABELS[index % 3]
    language = languages[index // 3 % len(languages)]
    doubtful = rng.random() < noise
    while True:
        review = meaning(rng, label, doubtful=doubtful, seen=split == "train")
        text = review.text(language, rng)
        if split_of(text) == split:
            return text, label, language
