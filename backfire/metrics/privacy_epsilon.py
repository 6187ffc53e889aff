from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.registry import register


@register("privacy-epsilon")
class PrivacyEpsilon(Metric):
    """What a row can change at most, where the defense `dp` acted: the epsilon of (epsilon, delta)
    differential privacy (Dwork & Roth 2014), with `privacy_delta` beside it.

    Of one row: rows that stand k times are protected k times worse. None without the defense, or
    without noise. Computed, not measured, so without an interval.
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
