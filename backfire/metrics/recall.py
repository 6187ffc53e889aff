from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.evaluate.outcomes import class_values
from backfire.registry import register


@register("recall")
class Recall(Metric):
    """Share of the clean rows of a class that are predicted as it (van Rijsbergen 1979).

    The unweighted mean over classes, then `recall[class]`. Bootstrap interval.
    """

    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        return class_values("recall", evidence.clean)
