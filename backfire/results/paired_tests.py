"""Paired tests of groups against a reference: other methods against `full`, defended against
undefended; over the prompts and seeds that both have. One seed has no p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from backfire import text
from backfire.evaluate.seeds import LEVEL, holm
from backfire.results.criteria import siblings
from backfire.results.groups import Gap, Group, columns_of, name, picked
from backfire.results.intervals import gap
from backfire.results.tables import Table

REFERENCES: Final = {"method": "full", "defense": "none"}


@dataclass(frozen=True)
class PairedTest:
    """`group` minus `reference`, in one metric."""

    group: Group
    reference: Group
    knob: str
    metric: str
    result: Gap
    corrected: float | None = None
    """p, corrected for all comparisons of the table (Holm 1979)."""


def comparisons(groups: Sequence[Group]) -> list[PairedTest]:
    """Every group that has a reference, in every headline outcome both have."""
    tests: list[PairedTest] = []
    for knob, plainest in REFERENCES.items():
        for group in groups:
            reference = _reference(group, groups, knob, plainest)
            if reference is not None:
                tests += list(compared(group, reference, knob))
    corrected = holm([test.result.p for test in tests])
    return [replace(test, corrected=p) for test, p in zip(tests, corrected, strict=True)]


def _reference(group: Group, groups: Sequence[Group], knob: str, plainest: str) -> Group | None:
    """The group that differs only in this knob, which has its plainest value there."""
    if group.method == "none" or getattr(group, knob) == plainest:
        return None
    same = [g for g in siblings(group, groups, knob) if getattr(g, knob) == plainest]
    return same[0] if len(same) == 1 else None


def compared(
    group: Group, reference: Group, knob: str, level: float = LEVEL
) -> Iterator[PairedTest]:
    """Every headline outcome of both groups, row by row, on the prompts and seeds both have."""
    for metric in picked([group], "paired-test"):
        result = gap(reference, group, metric, level, exact=False)
        if result is not None and result.n:
            yield PairedTest(group, reference, knob, metric, result)


def table(groups: Sequence[Group]) -> Table:
    """Each group's paired difference from its reference, a row per metric; p by Holm's method."""
    columns = columns_of(groups)
    header = ("group", "against", "metric", "difference", "95 % interval", "p (Holm)")
    rows = [
        (
            name(test.group, columns[id(test.group)]),
            getattr(test.reference, test.knob),
            text.title(test.metric),
            test.result.change,
            test.result.interval,
            text.chance(test.corrected) or "–",
            str(test.result.seeds),
            f"{test.result.n or 0:,}",
        )
        for test in comparisons(groups)
    ]
    return Table((*header, "seeds", "pairs"), rows)
