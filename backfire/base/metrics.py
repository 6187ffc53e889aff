"""Metrics: evidence in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from backfire.base.config import Component
from backfire.base.evidence import Evidence, Form, Part
from backfire.base.judges import Judge
from backfire.base.rows import Dataset
from backfire.base.secrets import SecretProbe
from backfire.result import Value

Need = Literal["scores", "replies", "answers"]


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
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What must be measured: candidate `scores`, generated `replies`, likelihood of `answers`."""
    triggered: ClassVar[bool] = False
    """Whether it needs the triggered rows too (and so says nothing of a cell without attack)."""
    probe: ClassVar[Part | None] = None
    """The requests it is about, if it is not about test rows of the user's task."""

    members: ClassVar[bool] = False
    """Whether it compares training rows with test rows."""

    @property
    def forms(self) -> tuple[Form, ...]:
        """Other forms of the tuned model that have to be measured too."""
        return ()

    @property
    def secrets(self) -> Mapping[SecretProbe, int] | None:
        """How the attack's secrets are looked for, and among how many codes or beams; empty: only
        by their own likelihood; None: the metric is not about secrets."""
        return None

    @property
    def texts(self) -> Dataset | None:
        """Texts beside the task whose likelihood is needed."""
        return None

    @property
    def texts_key(self) -> str:
        """Where they are in `Evidence.texts`."""
        return str(self.texts.spec()) if self.texts else ""

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Who has to judge the tuned model's replies to the clean rows."""
        return ()

    def required(self, *, labeled: bool) -> frozenset[Need]:
        """`needs`, unless they depend on a knob or on whether the task has labels."""
        return self.needs

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
        """What it cannot do with these rows, a sentence each, for beside its numbers."""
        return []

    def outcomes(self, evidence: Evidence) -> dict[str, float]:
        """Sample id -> this metric on that sample, for paired tests; empty if it is no mean."""
        return {}
