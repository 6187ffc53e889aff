from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Ranks, Sample, Value, ask
from backfire.evaluate.outcomes import grouped, resampled, scored
from backfire.evaluate.stats import Floats, log_odds, macro, one_vs_rest_auc
from backfire.late import np
from backfire.registry import register


@register("auc", version=2)
class AUC(Metric):
    """Area under the ROC curve, one class against the rest (Hanley & McNeil 1982; Fawcett 2006).

    From a softmax over the candidates; log-odds that agree to nine decimals are tied. The
    unweighted mean over the classes that occur, also `auc[group]`. Not reported if rows differ in
    their candidates or there is only one class. Bootstrap interval.
    """

    ranks: ClassVar[Ranks] = {"tuning": 2}
    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        rows = scored(evidence.clean, "auc")
        if len({frozenset(row.candidates) for row in rows}) > 1:
            return []
        return [value for name, part in grouped("auc", rows) for value in _auc(name, part)]


def _auc(name: str, rows: Sequence[Sample]) -> list[Value]:
    labels = list(rows[0].candidates)
    table = [dict(zip(row.candidates, row.logprobs or (), strict=True)) for row in rows]
    odds = log_odds(np.array([[line[label] for label in labels] for line in table])).round(9)
    true = np.array([labels.index(row.label) if row.label in labels else -1 for row in rows])

    def statistic(counts: Floats) -> Floats:
        return macro(one_vs_rest_auc(odds, true, counts))

    return resampled([name], len(rows), statistic, "higher", "score")
