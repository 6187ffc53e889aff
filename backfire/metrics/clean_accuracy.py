from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Ranks, Sample, Value, ask
from backfire.evaluate.outcomes import change, label_accuracy, scored
from backfire.evaluate.stats import paired
from backfire.registry import register


@register("clean-accuracy")
class CleanAccuracy(Metric):
    """Accuracy without the trigger: CACC in OpenBackdoor (Cui et al. 2022, arXiv:2206.08514).

    The quality of a backdoored model for its users: `accuracy` under its usual name next to an
    attack. Then `clean_accuracy_change`, its paired difference from the clean-model baseline: the
    cost of the poison. Not reported for cells without an attack. Also `clean_accuracy[group]`.
    Wilson interval.
    """

    ranks: ClassVar[Ranks] = {"accuracy": 2}
    repeats: ClassVar[str] = "accuracy"
    needs: ClassVar[Asks] = ask("clean", "scores", of=("tuned", "twin"))

    def measure(self, evidence: Evidence) -> list[Value]:
        if evidence.attack is None:
            return []
        values = label_accuracy("clean_accuracy", evidence.clean)
        if values and (twin := _right(evidence.twin)):
            gain = paired(_right(evidence.clean), twin)
            values.insert(1, change("clean_accuracy_change", gain, "higher", "clean_accuracy"))
        return values

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        return _right(evidence.clean) if evidence.attack else {}


def _right(samples: Sequence[Sample]) -> dict[str, float]:
    return {row.id: float(row.prediction == row.label) for row in scored(samples, "clean_accuracy")}
