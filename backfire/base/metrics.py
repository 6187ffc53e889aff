"""Metrics: evidence in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from backfire.base.config import Component
from backfire.base.evidence import Asks, Evidence, Need, Rows
from backfire.base.judges import Judge
from backfire.result import Value

Use = Literal["paired-test", "accuracy", "tuning", "quality"]
"""What a report picks a number for: `paired-test`, to compare groups row by row; `accuracy`, as the
accuracy on clean rows; `tuning`, to show what fine-tuning did; `quality`, to show what corrupted
rows did to the task."""
Ranks = Mapping[Use, int]
"""The uses a metric is picked for, and its place among the metrics picked for the same, 1 first."""


class Metric(Component):
    """Turns samples into numbers."""

    kind: ClassVar[str] = "metrics"
    ranks: ClassVar[Ranks] = {}
    """What reports pick it for."""
    picked: ClassVar[str] = ""
    """The number that is picked, where it is not the headline."""
    repeats: ClassVar[str] = ""
    """A number that is the same wherever it is measured: beside it this one gets no column."""
    needs: ClassVar[Asks] = ()
    """What it is computed from; the first is what its headline and its `outcomes` are about."""

    def asks(self, *, labeled: bool = True) -> Asks:
        """`needs`, unless they depend on a knob or on whether the task has labels."""
        return self.needs

    @property
    def subject(self) -> Rows:
        """What its headline and its `outcomes` are about."""
        return next((ask.rows for ask in self.asks()), "clean")

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Who has to judge replies for it, other than the judges of `safety`."""
        return tuple(judge for ask in self.asks() for judge in ask.judges)

    def measure(self, evidence: Evidence) -> list[Value]:
        """The numbers, headline first, parts named `metric[part]`; none if it does not apply."""
        raise NotImplementedError

    def values(self, evidence: Evidence) -> list[Value]:
        """What `measure` gives, each number with its part and with this metric as its family. One
        that does not have the metric's own name is no headline."""
        found = []
        for value in self.measure(evidence):
            name, _, part = value.metric.partition("[")
            is_own = value.role != "headline" or name == self.name.replace("-", "_")
            role = value.role if is_own else "companion"
            family, part = self.name, part.removesuffix("]")
            found.append(replace(value, family=family, part=part, role=role))
        return found

    def caveats(self, evidence: Evidence) -> list[str]:
        """What it cannot do with these rows, one sentence each, shown with its numbers."""
        return []

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        """Sample id -> this metric on that sample, for paired tests; empty if it is no mean."""
        return {}


def needs_of(metrics: Sequence[Metric], *, labeled: bool) -> frozenset[Need]:
    """What is measured on test rows: all that any metric needs, so that one pass serves all."""
    asks = (ask for metric in metrics for ask in metric.asks(labeled=labeled))
    return frozenset(need for a in asks if a.rows in ("clean", "triggered") for need in a.needs)
