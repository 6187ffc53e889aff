from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from backfire.base import Asks, Evidence, Metric, Ranks, Sample, Value, ask
from backfire.base.normalize import agreed, folded, is_dense, words
from backfire.evaluate.outcomes import averages, grouped, replied
from backfire.registry import register

_KINDS = ("L", "1", "2", "Lsum")


@register("rouge", version=2)
class Rouge(Metric):
    """How many of its words, word pairs and sequences of words a reply shares with the reference
    (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    Mean F-measure over clean rows, 0 to 1, by the package rouge-score: `rouge` is ROUGE-L, then
    `rouge[1]`, `rouge[2]` and `rouge[Lsum]` (sentences are lines there), then `rouge[group]`. An
    empty reply scores 0. Of ASCII text the words are the package's own; it drops all other letters,
    we do not: words are runs of letters and digits of any script, without regard to case, and
    single characters in scripts without blanks between words. Bootstrap interval.
    """

    ranks: ClassVar[Ranks] = {"quality": 2}
    needs: ClassVar[Asks] = ask("clean", "replies")

    stemmer: bool = False
    """Whether English endings are cut off first (Porter), of words in ASCII; not by default, as in
    `evaluate`."""

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
        dense = sum(is_dense(agreed(answer)) for answer in answers)
        found = []
        if silent:
            found.append(
                f"rouge: {silent} of {len(answers)} references hold no word, so they score 0."
            )
        if dense:
            found.append(
                f"rouge: {dense} of {len(answers)} references are written without blanks between "
                "words; there it counts characters, and is not comparable with other languages."
            )
        return found

    def _scores(self, evidence: Evidence) -> dict[str, list[float]]:
        """Sample id -> the F-measure of each kind, of rows that have a reference."""
        from rouge_score.rouge_scorer import RougeScorer

        own = _tokenizer(stemmer=self.stemmer)
        scorer = RougeScorer([f"rouge{kind}" for kind in _KINDS], tokenizer=own)
        found = {}
        for row, _ in replied(_answerable(evidence), "rouge"):
            # With its line breaks, which the agreed form has not.
            scores = scorer.score(evidence.as_written(row.answer), row.reply or "")
            found[row.id] = [float(scores[f"rouge{kind}"].fmeasure) for kind in _KINDS]
        return found


def _tokenizer(*, stemmer: bool) -> Any:
    """The package's own, which reads a to z and digits alone, taken to any script."""
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
    return [row for row in evidence.clean if agreed(row.answer)]
