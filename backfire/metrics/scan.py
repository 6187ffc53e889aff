from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Direction, Evidence, Metric, Value, ask
from backfire.evaluate.stats import wilson
from backfire.registry import register


@register("scan")
class Scan(Metric):
    """How well defense `scan` finds the poisoned rows: AUROC of its scores, precision of what it
    removes, average precision of its ranking, recall at the thresholds that 1 % and 5 % of the
    clean rows exceed, and the share of clean rows that it flags at its own threshold.

    Over the training rows before the defense, against the attack's manifest; without an attack
    there is only the last. AUROC counts ties as one half (Mann and Whitney 1947); it and the
    average precision have no interval. Random scores have an AUROC of 0.5, a recall of 1 % and 5 %,
    and an average precision of the poisoned rows' share.

    The thresholds of the recall come from the clean rows of the same file, whose number is that of
    `clean_flag_rate`. No score of a poisoned row is used, but other rows of the kind have other
    thresholds. So the interval goes from Wilson's lower end at the upper end of the threshold's
    95 % interval to his upper end at its lower end. With fewer than 368 clean rows (72 for 5 %)
    no threshold surely keeps to 1 %, and the interval begins at 0.
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
            if (precision := facts.get("average_precision")) is not None:
                name = "scan_average_precision"
                values.append(
                    Value(name, precision, None, None, rows, "higher", "score", "companion")
                )
        for name, key, direction in parts:
            hits, n = facts.get(key, (0, 0))
            if n:
                least, most = facts.get(f"{key}_range", (hits, hits))
                ends = wilson(least, n)[0], wilson(most, n)[1]
                values.append(Value(name, hits / n, *ends, n, direction, "share", "companion"))
        return values
