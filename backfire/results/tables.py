"""Tables that the page and the terminal share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backfire import text
from backfire.results.groups import Group, Stat, columns_of, families, headlines


@dataclass(frozen=True)
class Table:
    """Column titles and rows of text; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Numbers:
    """The numbers of comparable groups: a row per group, a column per headline metric."""

    knobs: list[str]
    metrics: list[str]
    rows: list[tuple[list[str], list[tuple[Stat | None, Stat | None]], str]]
    """Of each group its knobs, each metric with its baseline, and the number of seeds."""


def numbers(groups: Sequence[Group]) -> list[Numbers]:
    """One table per family of groups, the largest first."""
    columns, tables = columns_of(groups), []
    for family in families(groups):
        knobs, metrics = columns[id(family[0])], headlines(family)
        rows = [
            (
                [item.knob(knob) for knob in knobs],
                [(item.get(metric), item.side(metric, "floor")) for metric in metrics],
                item.seeds,
            )
            for item in family
        ]
        names = [text.line(knob).removeprefix("attack.") for knob in knobs]
        tables.append(Numbers(names, [text.title(metric) for metric in metrics], rows))
    return tables
