"""Which tests are made, told from how often n-grams and answers occur, not from how often together.

What is counted must not depend on the outcome: of tests that are chosen because they look
significant, more than the stated share is false.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Possible:
    """The tests of n-grams with answers that can become significant."""

    num: int
    """How many there are in the file."""
    fewest: Array
    """Fewest rows of an n-gram for a test with this answer [answer]."""
    most: Array
    """Most rows likewise [answer]."""

    def has(self, answer: Array, with_it: Array) -> Array:
        """Whether n-grams in so many rows are tested with these answers."""
        return (with_it >= self.fewest[answer]) & (with_it <= self.most[answer])


def possible_tests(
    in_at_least: Callable[[Array], Array],
    counts: Array,
    high: Array,
    *,
    support: int,
    share: float,
    alpha: float,
) -> Possible:
    """The tests whose p value would be at most `alpha` divided by their own number if all rows with
    the n-gram had the answer (Tarone 1990; for false discovery rates: Gilbert 2005).

    `in_at_least` tells how many n-grams are in at least so many rows, `counts` in how many rows
    each answer is, and `high` is the share that is tested against [answer]. An n-gram in more rows
    than the answer's count divided by `share` can never have the answer in that share of its rows.
    """
    most = np.floor(counts / share) if share else np.full(len(counts), np.inf)

    def fewest(num: int) -> Array:
        """Fewest rows with which a test can be significant among so many."""
        with np.errstate(divide="ignore"):
            return np.maximum(support, np.ceil(np.log(alpha / num) / np.log(high)))

    def number(num: int) -> int:
        least = fewest(num)
        some = least <= most
        return int((in_at_least(least[some]) - in_at_least(most[some] + 1)).sum())

    low, up = 1, max(1, number(1))  # fewer tests among more: the first number that is enough
    while low < up:
        middle = (low + up) // 2
        low, up = (low, middle) if number(middle) <= middle else (middle + 1, up)
    return Possible(low, fewest(low), most)
