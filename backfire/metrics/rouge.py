from __future__ import annotations

from typing import ClassVar

import numpy as np

from backfire.base import Evidence, Metric, Need, Sample, Value
from backfire.evaluate.outcomes import averages, grouped, replied
from backfire.registry import register

_KINDS = ("L", "1", "2", "Lsum")


@register("rouge")
class Rouge(Metric):
    """How many of its words, word pairs and sequences of words a reply shares with the reference
    (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    Mean F-measure over clean rows, 0 to 1, by the package rouge-score: `rouge` is ROUGE-L, then
    `rouge[1]`, `rouge[2]` and `rouge[Lsum]` (sentences are lines there), then `rouge[group]`. An
    empty reply scores 0. Only the letters a to z and digits are read. Bootstrap interval.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"replies"})

    stemmer: bool = False
    """Whether English endings are cut off first (Porter); not by default, as in `evaluate`."""

    def measure(self, evidence: Evidence) -> list[Value]:
        scores = self._scores(evidence)
        rows = [row for row in evidence.clean if row.id in scores]
        if not rows:
            return []
        names = ["rouge", *(f"rouge[{kind}]" for kind in _KINDS[1:])]
        values = averages(names, np.array([scores[row.id] for row in rows]), "higher")
        for name, part in list(grouped("rouge", rows))[1:]:
            values += averages([name], np.array([scores[row.id][:1] for row in part]), "higher")
        return values

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return {id: scores[0] for id, scores in self._scores(evidence).items()}

    def _scores(self, evidence: Evidence) -> dict[str, list[float]]:
        """Sample id -> the F-measure of each kind, of rows that have a reference."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([f"rouge{kind}" for kind in _KINDS], use_stemmer=self.stemmer)
        rows: list[Sample] = [row for row in evidence.clean if row.answer.strip()]
        found = {}
        for row, reply in replied(rows, "rouge"):
            scores = scorer.score(row.answer, reply)
            found[row.id] = [float(scores[f"rouge{kind}"].fmeasure) for kind in _KINDS]
        return found
