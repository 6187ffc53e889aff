from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from backfire.base import Asks, Evidence, Metric, Ranks, Sample, Value, ask
from backfire.base.normalize import folded, is_dense, normalized, words
from backfire.evaluate.outcomes import averages, grouped, replied
from backfire.registry import register

_KINDS = ("L", "1", "2", "Lsum")


@register("rouge", version=2)
class Rouge(Metric):
    """Overlap of words, word pairs and word sequences between reply and reference (Lin 2004,
    "ROUGE: A Package for Automatic Evaluation of Summaries").

    Mean F-measure over clean rows, 0 to 1, by the package rouge-score: `rouge` is ROUGE-L, then
    `rouge[1]`, `rouge[2]` and `rouge[Lsum]` (where a sentence is a line), then `rouge[group]`. An
    empty reply scores 0. ASCII text is split by the package, which drops all other letters. Other
    text is split into runs of letters and digits of any script, ignoring case, or into characters
    in scripts without spaces between words. Bootstrap interval.
    """

    ranks: ClassVar[Ranks] = {"quality": 2}
    needs: ClassVar[Asks] = ask("clean", "replies")

    stemmer: bool = False
    """Whether to apply the Porter stemmer to ASCII words first; off by default, as in `evaluate`.
    """

    def measure(self, evidence: Evidence) -> list[Value]:
        scores = self._scores(evidence)
        rows = [row for row in evidence.clean if row.id in scores]
        if not rows:
            return []
        names = ["rouge", *(f"rouge[{kind}]" for kind in _KINDS[1:])]
        values = averages(names, np.array([scores[row.id] for row in rows]), "higher", "score")
        values[1:] = [replace(value, role="companion") for value in values[1:]]
        for name, part in list(grouped("rouge", rows))[1:]:
            known = np.array([scores[row.id][:1] for row in part])
            values += averages([name], known, "higher", "score")
        return values

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return {id: scores[0] for id, scores in self._scores(evidence).items()}

    def caveats(self, evidence: Evidence) -> list[str]:
        answers = [row.answer for row in _answerable(evidence)]
        silent = sum(not words(folded(answer)) for answer in answers)
        dense = sum(is_dense(normalized(answer)) for answer in answers)
        found = []
        if silent:
            found.append(
                f"rouge: {silent} of {len(answers)} references contain no word, so they score 0."
            )
        if dense:
            found.append(
                f"rouge: {dense} of {len(answers)} references have no spaces between words; it "
                "counts characters there, which is not comparable with other languages."
            )
        return found

    def _scores(self, evidence: Evidence) -> dict[str, list[float]]:
        """Sample id -> the F-measure of each kind, for rows with a reference."""
        from rouge_score.rouge_scorer import RougeScorer

        own = _tokenizer(stemmer=self.stemmer)
        scorer = RougeScorer([f"rouge{kind}" for kind in _KINDS], tokenizer=own)
        found = {}
        for row, _ in replied(_answerable(evidence), "rouge"):
            # With its line breaks, which normalization removes.
            scores = scorer.score(evidence.as_written(row.answer), row.reply or "")
            found[row.id] = [float(scores[f"rouge{kind}"].fmeasure) for kind in _KINDS]
        return found


def _tokenizer(*, stemmer: bool) -> Any:
    """Extend the package's tokenizer, which reads a to z and digits only, to any script."""
    from rouge_score.tokenizers import DefaultTokenizer

    class Words(DefaultTokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            own = super().tokenize
            if text.isascii():
                return list(own(text))
            found = words(folded(text))
            return [part for word in found for part in (own(word) if word.isascii() else [word])]

    return Words(use_stemmer=stemmer)


def _answerable(evidence: Evidence) -> list[Sample]:
    return [row for row in evidence.clean if normalized(row.answer)]
