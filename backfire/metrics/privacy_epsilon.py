from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.registry import register


@register("privacy-epsilon")
class PrivacyEpsilon(Metric):
    """The epsilon of the (epsilon, delta) differential privacy that the defense `dp` guarantees
    (Dwork & Roth 2014), with `privacy_delta`.

    It holds for one row: rows that occur k times are protected k times worse. Not reported without
    the defense or without noise. Computed, not measured, so without an interval.
    """

    needs: ClassVar[Asks] = ask("training")

    def measure(self, evidence: Evidence) -> list[Value]:
        parts = [
            (name, evidence.training.get(name)) for name in ("privacy_epsilon", "privacy_delta")
        ]
        return [
            Value(name, float(value), None, None, 1, "lower", "amount")
            for name, value in parts
            if value is not None
        ]
