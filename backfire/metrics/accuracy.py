from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Ranks, Value, ask
from backfire.evaluate.outcomes import label_accuracy, scored
from backfire.registry import register


@register("accuracy")
class Accuracy(Metric):
    """Share of clean rows whose most likely candidate is the true label (interval: Wilson 1927).

    Also `accuracy[group]` if rows have a group, such as a language.
    """

    ranks: ClassVar[Ranks] = {"paired-test": 1, "accuracy": 1, "tuning": 1, "quality": 6}
    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        return label_accuracy("accuracy", evidence.clean)

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return {
            row.id: float(row.prediction == row.label) for row in scored(evidence.clean, "accuracy")
        }
