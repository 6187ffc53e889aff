from __future__ import annotations

from collections import Counter
from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.evaluate.outcomes import labels_of, scored
from backfire.registry import register


@register("confusion")
class Confusion(Metric):
    """Number of clean rows for each pair of true and predicted label (Miller & Nicely 1955).

    `confusion[true>predicted]`: counts, zeros included, without an interval; `n` is the number of
    rows with that true label.
    """

    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        rows = scored(evidence.clean, "confusion")
        counts = Counter((row.label, row.prediction) for row in rows)
        labels, totals = labels_of(rows), Counter(row.label for row in rows)
        return [
            Value(
                f"confusion[{true}>{predicted}]",
                float(counts[true, predicted]),
                None,
                None,
                totals[true],
                "none",
                "count",
            )
            for true in labels
            for predicted in labels
        ]
