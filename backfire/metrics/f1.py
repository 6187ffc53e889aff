from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Ranks, Value, ask
from backfire.evaluate.outcomes import class_values
from backfire.registry import register


@register("f1")
class F1(Metric):
    """Harmonic mean of precision and recall (van Rijsbergen 1979), averaged over classes.

    The mean of the classes' F1, not the F1 of mean precision and mean recall (Opitz & Burst 2019,
    arXiv:1911.03347). Also `f1[class]`. Bootstrap interval.
    """

    ranks: ClassVar[Ranks] = {"accuracy": 4}
    needs: ClassVar[Asks] = ask("clean", "scores")

    def measure(self, evidence: Evidence) -> list[Value]:
        return class_values("f1", evidence.clean)
