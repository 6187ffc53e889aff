from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.evaluate.outcomes import class_values
from backfire.registry import register


@register("precision")
class Precision(Metric):
    """Share of the clean rows predicted as a class that belong to it (van Rijsbergen 1979).

    The unweighted mean over classes, then `precision[class]`. A class that is never predicted
    scores 0. Bootstrap interval.
    """

    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        return class_values("precision", evidence.clean)
