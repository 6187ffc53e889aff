from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Ranks, Value, ask
from backfire.base.normalize import normalized
from backfire.evaluate.outcomes import answerable, grouped, replied, share
from backfire.registry import register


@register("exact-match", version=2)
class ExactMatch(Metric):
    """Share of clean rows answered exactly (as in Lisa, Huang et al. 2024, arXiv:2405.18641).

    Case counts; an extra word or an empty reply is wrong; Unicode form, typography (curly quotes,
    dashes) and whitespace do not count. Rows without a reference answer are excluded. Also
    `exact_match[group]`. Wilson interval.
    """

    ranks: ClassVar[Ranks] = {"paired-test": 2, "accuracy": 3, "quality": 5}
    needs: ClassVar[Asks] = ask("clean", "replies")

    def measure(self, evidence: Evidence) -> list[Value]:
        hits = self.outcomes(evidence)
        parts = grouped("exact_match", answerable(evidence.clean))
        return [share(name, [hits[row.id] for row in rows], "higher") for name, rows in parts]

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        pairs = replied(answerable(evidence.clean), "exact_match")
        return {
            row.id: float(reply == normalized(evidence.as_written(row.answer)))
            for row, reply in pairs
        }
