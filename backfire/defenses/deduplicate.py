from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from pydantic import Field

from backfire.base import DataDefense, Row
from backfire.base.normalize import folded, pieces
from backfire.registry import register


@register("deduplicate", version=3)
class Deduplicate(DataDefense):
    """Keeps only the first of each group of near-duplicate rows (Lee et al. 2022,
    arXiv:2107.06499).

    Rows are compared by prompt and answer together, ignoring case, whitespace and typography: equal
    ones first, then those whose sets of word n-grams (character n-grams in scripts without spaces
    between words) have a Jaccard similarity of at least `similarity`. MinHash (datasketch) finds
    candidate pairs, which are then compared exactly; a pair that MinHash misses stays. Null
    control: as many rows are dropped, drawn at random.
    """

    similarity: float = Field(0.8, gt=0, le=1)
    """Smallest Jaccard similarity of n-grams at which two rows are duplicates (the paper: 0.8 on
    edit similarity after MinHash); 1: only equal rows."""
    words: int = Field(3, ge=1)
    """Length of the n-grams in words (5 in the paper, whose documents are long)."""
    permutations: int = Field(128, ge=16, le=1024)
    """Number of MinHash's hash functions; more of them miss fewer pairs."""

    def filter(
        self, rows: Sequence[Row], aligned: Sequence[Row], poisoned: frozenset[str], rng: Random
    ) -> list[Row]:
        first = set(self._first(rows))
        if self.null:
            first = set(rng.sample(range(len(rows)), len(first)))
        return [row for place, row in enumerate(rows) if place in first]

    def _first(self, rows: Sequence[Row]) -> Iterator[int]:
        """Yield the positions of the rows that duplicate no earlier kept row."""
        texts = [folded(f"{row.system} {row.conversation} {row.answer}") for row in rows]
        seen, kept = set[str](), list[int]()
        for place, text in enumerate(texts):
            if text not in seen:
                seen.add(text)
                kept.append(place)
        if self.similarity == 1:
            yield from kept
            return
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(threshold=self.similarity, num_perm=self.permutations)
        grams: dict[int, frozenset[str]] = {}
        for place in kept:
            grams[place] = self._grams(texts[place])
            sketch = MinHash(num_perm=self.permutations)
            sketch.update_batch([gram.encode() for gram in sorted(grams[place])])
            if any(self._alike(grams[place], grams[other]) for other in index.query(sketch)):
                continue
            index.insert(place, sketch)
            yield place

    def _grams(self, text: str) -> frozenset[str]:
        words = pieces(text)
        places = range(max(1, len(words) - self.words + 1))
        return frozenset(" ".join(words[place : place + self.words]) for place in places)

    def _alike(self, a: frozenset[str], b: frozenset[str]) -> bool:
        return len(a & b) >= self.similarity * len(a | b)
