"""Base class for metrics, which compute numbers from evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from backfire.base.config import Component
from backfire.base.evidence import Asks, Evidence, Need, Rows
from backfire.base.judges import Judge
from backfire.result import Value

Use = Literal["paired-test", "accuracy", "tuning", "quality"]
"""Uses of a metric in reports: `paired-test`, to compare groups row by row; `accuracy`, as the
accuracy on clean rows; `tuning`, for the effect of fine-tuning; `quality`, for that of corrupted
rows on the task."""
Ranks = Mapping[Use, int]
"""Use -> rank of a metric among those with the same use, 1 first."""


class Metric(Component):
    """Computes numbers from the evidence of a cell."""

    kind: ClassVar[str] = "metrics"
    ranks: ClassVar[Ranks] = {}
    """Its uses in reports."""
    picked: ClassVar[str] = ""
    """The number that reports use, if it is not the headline."""
    repeats: ClassVar[str] = ""
    """Name of another number with the same value; if that is shown, this one gets no column."""
    needs: ClassVar[Asks] = ()
    """The evidence it requires; headline and `outcomes` are about the first."""

    def asks(self, *, labeled: bool = True) -> Asks:
        """`needs`, unless they depend on a knob or on whether the task has labels."""
        return self.needs

    @property
    def subject(self) -> Rows:
        """The rows of its headline and its `outcomes`."""
        return next((ask.rows for ask in self.asks()), "clean")

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Judges of replies that it requires, other than those of `safety`."""
        return tuple(judge for ask in self.asks() for judge in ask.judges)

    def measure(self, evidence: Evidence) -> list[Value]:
        """The numbers, headline first, parts named `metric[part]`; none if it does not apply."""
        raise NotImplementedError

    def values(self, evidence: Evidence) -> list[Value]:
        """The numbers of `measure`, each with its part and with this metric as its family. A
        headline without the metric's name becomes a companion."""
        values = []
        for value in self.measure(evidence):
            name, _, part = value.metric.partition("[")
            is_own = value.role != "headline" or name == self.name.replace("-", "_")
            role = value.role if is_own else "companion"
            family, part = self.name, part.removesuffix("]")
            values.append(replace(value, family=family, part=part, role=role))
        return values

    def caveats(self, evidence: Evidence) -> list[str]:
        """Limitations on these rows, one sentence each, shown with the numbers."""
        return []

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        """Sample id -> this metric on that sample, for paired tests; empty if it is no mean."""
        return {}


def needs_of(
    metrics: Sequence[Metric], *, labeled: bool, rows: Sequence[Rows] = ("clean", "triggered")
) -> frozenset[Need]:
    """Everything that any metric needs on test rows (of these kinds), so that one pass measures
    it."""
    asks = (ask for metric in metrics for ask in metric.asks(labeled=labeled))
    return frozenset(need for ask in asks if ask.rows in rows for need in ask.needs)


def reads_target_rows(metrics: Sequence[Metric], *, labeled: bool) -> bool:
    """Whether any metric reads triggered rows whose true label is the attack's target."""
    asks = (ask for metric in metrics for ask in metric.asks(labeled=labeled))
    return any(ask.target_rows for ask in asks if ask.rows == "triggered")
