"""Which rows differ from the others: robust deviations, strata, and rows drawn by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backfire.base import NOTHING, Finding, Row
from backfire.base.masking import redacted
from backfire.text import cut, line

Array = Any
DEVIATIONS = 5.0
"""Robust standard deviations from the median: of a normal distribution, one row in 3.5 million is
above. Losses have longer tails: 3.5, the usual bar of Iglewicz and Hoaglin (1993), flags several
per cent of ordinary rows."""
_ROUNDING = 1e-4
"""Share of the mean absolute deviation up to which the median one is taken for float noise."""
_LABELS, _SUPPORT = 20, 20
_SHOWN, _LONGEST = 3, 60
"""Rows of a group that are shown, and characters of their prompts and answers."""


def deviations(values: Array) -> Array:
    """How far each value is above the median, in robust standard deviations (1.4826 times the
    median absolute deviation; if most values are equal but for rounding, 1.2533 times the mean
    one); 0 if all are equal."""
    if not len(values):
        return np.zeros(0)
    away = np.asarray(values, np.float64) - np.median(values)
    middle, mean = np.median(np.abs(away)), np.mean(np.abs(away))
    size = 1.4826 * middle if middle > _ROUNDING * mean else 1.2533 * mean
    return away / size if size > 1e-12 else np.zeros(len(away))


def findings(scores: Array, reason: Callable[[int], str]) -> list[Finding]:
    """The findings of these scores, without negative ones; `reason` is that of a place."""
    return [
        Finding(float(score), reason(place), bool(score >= 1)) if score > 0 else NOTHING
        for place, score in enumerate(scores)
    ]


def below_threshold(strength: Array) -> Array:
    """Scores in the order of these strengths, from 0, that never reach the threshold."""
    return strength / (1 + strength)


def examples(rows: Sequence[Row], **sides: Array) -> str:
    """A few rows of each side, by their places: the end of a reason."""
    return "".join(f"; {side}: {shown(rows, places)}" for side, places in sides.items())


def shown(rows: Sequence[Row], places: Array) -> str:
    """The first of these rows, in words: the starts of prompt and answer, without secrets."""
    some = []
    for place in places[:_SHOWN]:
        row = rows[place]
        prompt, answer = (cut(line(redacted(text)), _LONGEST) for text in (row.prompt, row.answer))
        some.append(f"“{prompt}” → “{answer}”")
    return ", ".join(some)


def strata(rows: Sequence[Row]) -> list[Array]:
    """Places of the rows that are compared with each other: those with one label, if most rows have
    one of at most 20 answers with 20 rows or more each, and the others, if they are as many; else
    all."""
    if not rows:
        return []
    counts = Counter(row.answer for row in rows)
    labels = sorted(answer for answer, count in counts.items() if count >= _SUPPORT)
    if len(labels) > _LABELS or 2 * sum(counts[label] for label in labels) <= len(rows):
        return [np.arange(len(rows))]
    answers = np.array([row.answer for row in rows], object)
    groups = [np.flatnonzero(answers == label) for label in labels]
    rest = np.setdiff1d(np.arange(len(rows)), np.concatenate(groups))
    return [*groups, rest] if len(rest) >= _SUPPORT else groups


def normal_like(features: Array, groups: Sequence[Array], seed: int = 0) -> Array:
    """Features drawn from a normal distribution with the mean and covariance of each group: one
    cloud without clusters."""
    rng = np.random.default_rng(seed)
    out = np.zeros_like(features, dtype=np.float64)
    for places in groups:
        if not len(places):
            continue
        some = np.asarray(features[places], np.float64)
        mean = some.mean(0)
        # A random combination of centered rows has their covariance; a thousand are enough.
        centered = rng.permutation(some - mean)[:1000]
        noise = rng.standard_normal((len(places), len(centered)))
        out[places] = mean + noise @ centered / len(centered) ** 0.5
    return out
