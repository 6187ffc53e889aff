"""Paired tests of every group against its reference: the other methods against `full`, the defended
against the undefended. Prompt by prompt and seed by seed, on what both answered; no p of one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from backfire import text
from backfire.evaluate.seeds import LEVEL, holm
from backfire.results.groups import Gap, Group, columns_of, name, picked
from backfire.results.intervals import gap

REFERENCES: Final = {"method": "full", "defense": "none"}


@dataclass(frozen=True)
class Comparison:
    """`group` minus `reference`, in one metric."""

    group: Group
    reference: Group
    knob: str
    metric: str
    result: Gap
    corrected: float | None = None
    """p, corrected for all comparisons of the table (Holm 1979)."""


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    """Every group that has a reference, in every headline outcome both have."""
    found: list[Comparison] = []
    for knob, plainest in REFERENCES.items():
        for group in groups:
            reference = _reference(group, groups, knob, plainest)
            if reference is not None:
                found += list(compared(group, reference, knob))
    corrected = holm([test.result.p for test in found])
    return [replace(test, corrected=p) for test, p in zip(found, corrected, strict=True)]


def _reference(group: Group, groups: Sequence[Group], knob: str, plainest: str) -> Group | None:
    """The group that differs in this knob alone, where it has its plainest value."""
    if group.method == "none" or getattr(group, knob) == plainest:
        return None
    same = [other for other in groups if getattr(other, knob) == plainest]
    rest = [k for k in ("model", "data", "attack", "rate", "method", "defense") if k != knob]
    alike = [
        other
        for other in same
        if all(getattr(other, k) == getattr(group, k) for k in rest)
        and other.beside(knob) == group.beside(knob)
    ]
    return alike[0] if len(alike) == 1 else None


def compared(
    group: Group, reference: Group, knob: str, level: float = LEVEL
) -> Iterator[Comparison]:
    """Every headline outcome both groups have, row by row, on the prompts and seeds both have."""
    for metric in picked([group], "paired-test"):
        result = gap(reference, group, metric, level, exact=False)
        if result is not None and result.n:
            yield Comparison(group, reference, knob, metric, result)


def lines(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Each group's paired difference from its reference, a line a metric; p by Holm's method."""
    columns, found = columns_of(groups), list[dict[str, str]]()
    for test in comparisons(groups):
        line = {
            "group": name(test.group, columns[id(test.group)]),
            "reference": getattr(test.reference, test.knob),
            "metric": text.title(test.metric),
            "difference": test.result.change,
            "interval": test.result.interval,
            "p": text.chance(test.corrected) or "–",
            "seeds": str(test.result.seeds),
            "pairs": f"{test.result.n or 0:,}",
        }
        found.append(line)
    return found
