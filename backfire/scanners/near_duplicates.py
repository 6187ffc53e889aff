from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from pydantic import Field

from backfire.base import Finding, Row, Scanner
from backfire.registry import register


@register("near-duplicates", version=3)
class NearDuplicates(Scanner):
    """Finds rows that nearly repeat an earlier one (Lee et al. 2022, arXiv:2107.06499).

    Prompt and answer together are compared by their word n-grams, ignoring case, whitespace and
    typography; of a text with more than 400 words, the first and the last 200. MinHash in 32 bands
    of 2 estimates the Jaccard similarity, with a standard error of about 0.05 near 0.8. The first
    of several copies is not flagged. Memory is fixed (36 MB): beyond some 90,000 rows, a copy of a
    row far above may be missed. The score is the similarity divided by the threshold, plus 0.2 if
    all words are the same, also those in the middle of a long text.
    """

    blind: ClassVar[str] = "paraphrases and translations"
    in_text: ClassVar[bool] = True

    similarity: float = Field(0.8, gt=0, le=1)
    """Estimated Jaccard similarity of n-grams from which a row is flagged, 0 to 1."""
    words: int = Field(3, ge=1)
    """Length of the n-grams in words."""

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        from backfire.scanners._minhash import Earlier, alike_to

        earlier = Earlier(self.words)
        for number, keys in earlier.each(rows, answer=True):
            like = earlier.nearest(keys)
            if like.similarity < self.similarity:
                earlier.add(keys, number)
            yield alike_to("it", f"row {like.number:,}", like, keys, self.similarity)
