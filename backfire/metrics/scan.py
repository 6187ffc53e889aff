from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Direction, Evidence, Metric, Value, ask
from backfire.evaluate.stats import wilson
from backfire.registry import register


@register("scan")
class Scan(Metric):
    """How well defense `scan` finds the poisoned rows: AUROC of its scores, precision of what it
    removes, recall at the thresholds that 1 % and 5 % of the clean rows exceed, and the share of
    clean rows that it flags at its own threshold.

    Over the training rows before the defense, against the attack's manifest; without an attack
    there is only the last. AUROC counts ties as one half (Mann and Whitney 1947) and has no
    interval. Random scores have an AUROC of 0.5 and a recall of 1 % and 5 %.
    """

    needs: ClassVar[Asks] = ask("training")

    def measure(self, evidence: Evidence) -> list[Value]:
        facts = evidence.training.get("scan") or {}
        parts: tuple[tuple[str, str, Direction], ...] = (
            ("scan_precision", "precision", "higher"),
            ("scan_recall_at_1", "recall_at_1", "higher"),
            ("scan_recall_at_5", "recall_at_5", "higher"),
            ("clean_flag_rate", "clean_flag_rate", "lower"),
        )
        values = []
        if (auroc := facts.get("auroc")) is not None:
            rows = facts["recall_at_1"][1] + facts["clean_flag_rate"][1]
            values.append(
                Value("scan_auroc", auroc, None, None, rows, "higher", "score", "companion")
            )
        for name, key, direction in parts:
            hits, n = facts.get(key, (0, 0))
            if n:
                ends = wilson(hits, n)
                values.append(Value(name, hits / n, *ends, n, direction, "share", "companion"))
        return values
