from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from pydantic import Field

from backfire.base import Finding, Row, Scanner
from backfire.registry import register


@register("overlap", version=4)
class Overlap(Scanner):
    """Finds rows whose prompt is nearly one of the test set's, so that a test would measure memory
    (Lee et al. 2022, arXiv:2107.06499).

    Prompts are compared by word n-grams, as by `near-duplicates`, of which the last 90,000 or so of
    the test set are kept. Without a test set nothing is found. The score is the similarity divided
    by the threshold, plus 0.2 if all words are the same.
    """

    blind: ClassVar[str] = "paraphrases and translations of test prompts"
    in_text: ClassVar[bool] = True
    needs_test: ClassVar[bool] = True

    similarity: float = Field(0.8, gt=0, le=1)
    """Estimated Jaccard similarity of n-grams from which a row is flagged, 0 to 1."""
    words: int = Field(3, ge=1)
    """Length of the n-grams in words."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        from backfire.scanners._minhash import Earlier, alike_to

        known = Earlier(self.words)
        for number, keys in known.each(test):
            known.add(keys, number)
        for _, keys in known.each(rows):
            like = known.nearest(keys)
            other = f"that of test row {like.number:,}"
            yield alike_to("its prompt", other, like, keys, self.similarity)
