from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from backfire.base import NOTHING, Finding, Measure, Measured, ModelScanner, Row
from backfire.registry import register
from backfire.scanners._outliers import deviations


@register("onion", version=3)
class Onion(ModelScanner):
    """Finds a word without which the prompt becomes far more likely, as an inserted trigger is
    (ONION: Qi et al. 2021, arXiv:2011.10369).

    Of the eight most surprising words of a prompt, each is left out; f is by how much the mean
    negative log-likelihood of the prompt's tokens falls (the paper compares perplexities, of which
    this is the logarithm, and leaves out every word). A row's f is its largest; flagged if it is
    `deviations` robust standard deviations above the median of all rows and the word is the oddest
    one of `support` rows. The score is the deviation over the threshold, below 1 for fewer rows.
    """

    blind: ClassVar[str] = (
        "triggers of several ordinary words, such as a sentence, and triggers that differ from row "
        "to row; a rare name in several rows may be flagged"
    )
    needs: ClassVar[frozenset[Measure]] = frozenset({"words"})

    deviations: float = Field(3.0, gt=0)
    """Robust standard deviations above the median from which a row is flagged."""
    support: int = Field(5, ge=1)
    """Fewest rows of which the word is the oddest; 1 is the paper's rule."""

    def look(self, rows: Sequence[Row], measured: Measured) -> list[Finding]:
        oddest = [max(each, key=lambda one: one[1], default=("", 0.0)) for each in measured.words]
        falls = np.array([fall for _, fall in oddest])
        away = deviations(falls)
        counts = Counter(word.casefold() for word, fall in oddest if fall > 0)
        return [
            self._finding(word, fall, float(z), counts[word.casefold()])
            for (word, fall), z in zip(oddest, away, strict=True)
        ]

    def _finding(self, word: str, fall: float, away: float, count: int) -> Finding:
        if fall <= 0 or away <= 0:
            return NOTHING
        score = away / self.deviations
        if count < self.support:
            score = min(score, 0.99) * count / self.support
        reason = (
            f"without “{word}” the perplexity of the prompt is {np.exp(-fall):.2f} times as large; "
            f"it is the oddest word of {count:,} rows"
        )
        return Finding(score, reason, score >= 1, (word,))
