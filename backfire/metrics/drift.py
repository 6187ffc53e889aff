from __future__ import annotations

from typing import ClassVar

from backfire.base import Asks, Evidence, Metric, Value, ask
from backfire.registry import register


@register("drift")
class Drift(Metric):
    """Distance of the trained weights from their start: the 2-norm over all of them (Lisa prints
    its square, arXiv:2405.18641). Comparable only between cells with the same method.
    """

    needs: ClassVar[Asks] = ask("training")

    def measure(self, evidence: Evidence) -> list[Value]:
        moved = evidence.training.get("drift")
        if moved is None:
            return []
        return [Value("drift", float(moved), None, None, 1, "lower", "amount")]

    def caveats(self, evidence: Evidence) -> list[str]:
        if not evidence.training or evidence.training.get("drift") is not None:
            return []
        return [
            "drift: not measured, since the starting values of more than 1,000 M trained weights "
            "are not stored in any file."
        ]
