from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from backfire.base import Asks, Evidence, Metric, Ranks, Value, ask
from backfire.base.normalize import folded, is_dense, normalized, words
from backfire.evaluate.outcomes import answerable, averages, grouped, replied
from backfire.late import np
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
            values += averages(
                [name], np.array([scores[row.id][:1] for row in part]), "higher", "score"
            )
        return values

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return {id: scores[0] for id, scores in self._scores(evidence).items()}

    def caveats(self, evidence: Evidence) -> list[str]:
        answers = [row.answer for row in answerable(evidence.clean)]
        silent = sum(not words(folded(answer)) for answer in answers)
        dense = sum(is_dense(normalized(answer)) for answer in answers)
        notes = []
        if silent:
            notes.append(
                f"rouge: {silent} of {len(answers)} references contain no word, so they score 0."
            )
        if dense:
            notes.append(
                f"rouge: {dense} of {len(answers)} references have no spaces between words; it "
                "counts characters there, which is not comparable with other languages."
            )
        return notes

    def _scores(self, evidence: Evidence) -> dict[str, list[float]]:
        """Sample id -> the F-measure of each kind, for rows with a reference."""
        from rouge_score.rouge_scorer import RougeScorer

        own = _tokenizer(stemmer=self.stemmer)
        scorer = RougeScorer([f"rouge{kind}" for kind in _KINDS], tokenizer=own)
        by_row = {}
        for row, _ in replied(answerable(evidence.clean), "rouge"):
            # With its line breaks, which normalization removes.
            scores = scorer.score(evidence.as_written(row.answer), row.reply or "")
            by_row[row.id] = [float(scores[f"rouge{kind}"].fmeasure) for kind in _KINDS]
        return by_row


def _tokenizer(*, stemmer: bool) -> Any:
    """Extend the package's tokenizer, which reads a to z and digits only, to any script."""
    from rouge_score.tokenizers import DefaultTokenizer

    class Words(DefaultTokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            own = super().tokenize
            if text.isascii():
                return list(own(text))
            tokens = words(folded(text))
            return [part for word in tokens for part in (own(word) if word.isascii() else [word])]

    return Words(use_stemmer=stemmer)
