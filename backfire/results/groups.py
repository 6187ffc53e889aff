"""Groups: cells that differ only in their seed, and the settings that distinguish groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from backfire import text
from backfire.registry import find, names
from backfire.result import CellResult, Role, Unit, Value

if TYPE_CHECKING:
    from backfire.base import Metric, Use

WIDEST: Final = 48
ABSENT: Final = {"attack": "no attack", "method": "not tuned", "defense": "no defense"}
"""Words for `none` in the name of a group."""
KNOBS: Final = ("model", "data", "attack", "rate", "method", "defense")


Scope = Literal["seeds", "model", "untuned", "alignment"]
"""What an interval covers: `seeds`, seeds and rows; `model`, the rows, for one trained model;
`untuned`, the rows, since nothing was trained; `alignment`, nothing, since all seeds start from one
aligned model."""
ONE_SEED: Final = " *"
"""Marks an interval for one trained model."""


@dataclass(frozen=True)
class Stat(Value):
    """One metric of a group of cells: its mean over seeds, their spread (sd), a 95 % interval."""

    spread: float | None = None
    seeds: int = 1
    """Number of trained models; 1 for an untuned one."""
    scope: Scope = "seeds"

    @property
    def title(self) -> str:
        return text.title(self.name, self.part)

    def number(self, digits: int = 1) -> str:
        """`94.1 %`, or `-0.3 points` for a change."""
        if self.is_change and self.value is not None:
            return text.change(self.unit, self.value, digits)
        return text.number(self.unit, self.value, digits)

    @property
    def sd(self) -> str:
        """`sd 0.4 %`; empty for one value."""
        if self.spread is None:
            return ""
        return f"sd {replace(self, value=self.spread).number().removeprefix('+')}"

    @property
    def interval(self) -> str:
        """`[92.0, 95.8]`, marked if it is for one trained model only."""
        return _marked(text.interval(self.unit, self.low, self.high), self.scope)

    @property
    def shown(self) -> str:
        """`94.1 % [92.0, 95.8]`, marked if it is for one trained model only."""
        return f"{self.number()} {self.interval}".rstrip()

    @property
    def rounded(self) -> str:
        """`98 % [97, 99]`: rounded to whole per cent if the interval is wide; for sentences."""
        is_wide = self.low is not None and self.high is not None and self.high - self.low >= 0.015
        digits = 0 if is_wide else 1
        ends = _marked(text.interval(self.unit, self.low, self.high, digits), self.scope)
        return f"{self.number(digits)} {ends}".rstrip()


def _marked(interval: str, scope: Scope) -> str:
    return interval + ONE_SEED if interval and scope == "model" else interval


@dataclass(frozen=True)
class Gap:
    """A difference and its 95 % interval; `p` only where there are several seeds."""

    unit: Unit
    difference: float
    low: float | None
    high: float | None
    p: float | None = None
    n: int | None = None
    """Number of paired outcomes, if it was computed row by row."""
    seeds: int = 1
    scope: Scope = "seeds"

    @property
    def covers_seeds(self) -> bool:
        """Whether its interval covers other seeds."""
        return self.low is not None and self.scope == "seeds"

    @property
    def is_clear(self) -> bool:
        """Whether its interval covers other seeds and excludes zero."""
        low, high = self.low, self.high
        return self.covers_seeds and low is not None and high is not None and not low <= 0 <= high

    @property
    def change(self) -> str:
        """`+47.0 points`."""
        return text.change(self.unit, self.difference)

    @property
    def interval(self) -> str:
        """`[42.8, 51.2]`, with a mark if it is of one trained model only."""
        return _marked(text.interval(self.unit, self.low, self.high), self.scope)

    @property
    def shown(self) -> str:
        """`+47.0 points [42.8, 51.2]`."""
        return f"{self.change} {self.interval}".rstrip()


@dataclass(frozen=True)
class Group:
    """Cells that differ only in their seed."""

    model: str
    data: str
    attack: str
    rate: float
    method: str
    defense: str
    axes: Mapping[str, Any]
    """Dotted key -> value of the matrix axes, without the seed."""
    settings: Mapping[str, Any]
    """Dotted key -> value of the resolved experiment, without the seed."""
    cells: tuple[CellResult, ...]
    stats: Mapping[str, Stat]

    @property
    def done(self) -> list[CellResult]:
        """The finished cells."""
        return [cell for cell in self.cells if cell.is_done]

    @property
    def seeds(self) -> str:
        """`3`, or `2 of 3` if a cell has no numbers; `1` if all cells share one model, `–` if
        nothing was trained."""
        from backfire.results.intervals import is_trained, model_of, one_alignment

        done, planned = len(self.done), len(self.cells)
        if done and not is_trained(self.done[0]):
            return "–"
        if done > 1 and len({model_of(cell) for cell in self.done}) == 1:
            return "1"
        suffix = " (1 alignment)" if done > 1 and one_alignment(*self.done) else ""
        return (str(done) if done == planned else f"{done} of {planned}") + suffix

    @property
    def poisoned(self) -> bool:
        return self.rate > 0 and self.attack != "none"

    def rounded(self, metric: str) -> str:
        """`98 % [97, 99]`: the metric for a sentence, see `Stat.rounded`."""
        return self.stats[metric].rounded

    def axes_without(self, knob: str) -> dict[str, Any]:
        """The axes other than this knob's."""
        return {key: value for key, value in self.axes.items() if not key.startswith(knob)}

    def get(self, metric: str) -> Stat | None:
        """The metric of this name if it has a value."""
        stat = self.stats.get(metric)
        return stat if stat and stat.value is not None else None

    def side(self, metric: str, role: Role) -> Stat | None:
        """The floor, excess or change of a headline metric, if it has a value."""
        sides = (s for s in self.stats.values() if s.of == metric and s.role == role)
        return next((s for s in sides if s.value is not None and not s.part), None)

    def knob(self, column: str) -> str:
        """What a column of `varying` shows for this group, cut to a table's width."""
        if column == "rate":
            return text.share(self.rate)
        if column in self.axes:
            value = self.axes[column]
            if column == "defense" and self.axes.get("defense.null") and self.defense != "none":
                value = {**(value if isinstance(value, Mapping) else {"name": value}), "null": True}
            return text.cut(text.knob(value), WIDEST)
        value = getattr(self, column) if column in KNOBS else self.settings.get(column)
        return text.cut(text.knob(value), WIDEST)


def group(cells: Iterable[CellResult]) -> list[Group]:
    """The groups, in the order of the cells. Cells that were not begun belong to none."""
    begun = [cell for cell in cells if cell.model is not None]
    # A cell that failed before its settings were written is grouped by its axes.
    by_axes = {_axes(cell): _settings(cell) for cell in begun if cell.settings}
    grouped: dict[str, list[CellResult]] = {}
    for cell in begun:
        key = _settings(cell) if cell.settings else by_axes.get(_axes(cell), _axes(cell))
        grouped.setdefault(key, []).append(cell)
    return [_group(cells) for cells in grouped.values()]


def _settings(cell: CellResult) -> str:
    return _hashable(_without_seed(cell.settings))


def _axes(cell: CellResult) -> str:
    return _hashable([[getattr(cell, knob) for knob in KNOBS], _without_seed(cell.axes)])


def _hashable(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _group(cells: Sequence[CellResult]) -> Group:
    first = next((cell for cell in cells if cell.is_done), cells[0])
    return Group(
        **{knob: str(getattr(first, knob) or "none") for knob in KNOBS if knob != "rate"},
        rate=first.rate or 0.0,
        axes=_without_seed(first.axes),
        settings=_without_seed(first.settings),
        cells=tuple(cells),
        stats=_stats(cells),
    )


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "seed"}


@cache
def declared(family: str) -> type[Metric] | None:
    """The metric of this registered name; None if it no longer exists."""
    return cast("type[Metric]", find("metrics", family)) if family in names("metrics") else None


def picked(groups: Sequence[Group], use: Use) -> list[str]:
    """The metrics of these groups that declare this use, by rank."""
    ranks: dict[str, int] = {}
    for stat in (stat for group in groups for stat in group.stats.values()):
        metric = declared(stat.family)
        if metric and use in metric.ranks:
            is_headline = stat.role == "headline" and not stat.part
            if stat.metric == metric.picked if metric.picked else is_headline:
                ranks[stat.metric] = metric.ranks[use]
    return sorted(ranks, key=ranks.__getitem__)


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that share a table, the largest table first. Two groups share one if the metrics of
    one include those of the other; a run about one question is one table."""
    of = {s.metric: s.family or s.metric for group in groups for s in group.stats.values()}
    heads = {value: of[value] for value in headlines(groups)}
    merged = list[tuple[list[Group], list[frozenset[str]]]]()
    for group in (group for group in groups if group.done):
        own = frozenset(metric for value, metric in heads.items() if group.get(value))
        members, sets = [group], [own]
        for family in [f for f in merged if any(own <= s or s <= own for s in f[1])]:
            merged.remove(family)
            members, sets = [*family[0], *members], [*family[1], *sets]
        merged.append((members, sets))
    tables = [members for members, _ in merged]
    for group in (group for group in groups if not group.done):  # placed by data and attack
        alike = (t for t in tables for g in t if (g.data, g.attack) == (group.data, group.attack))
        if table := next(alike, tables[0] if tables else None):
            table.append(group)
        else:
            tables.append([group])
    place = {id(group): number for number, group in enumerate(groups)}
    ordered = [sorted(members, key=lambda g: place[id(g)]) for members in tables]
    return sorted(ordered, key=lambda members: (-len(members), place[id(members[0])]))


def columns_of(groups: Sequence[Group]) -> dict[int, list[str]]:
    """`id` of a group -> the columns that name it: those that differ between families, then those
    that differ within its own."""
    tables = families(groups)
    between = [c for c in ("data", "attack") if tables[1:] and _differs(c, groups)]
    return {
        id(group): list(dict.fromkeys((*between, *own)))
        for family in tables
        for own in [varying(family)]
        for group in family
    }


def varying(groups: Sequence[Group]) -> list[str]:
    """The knobs by which these groups differ: the columns that name a row."""
    # The rate and the null control are part of other columns; the rest only follows from a defense
    # or says what is measured.
    excluded = ("attack.rate", "defense.null", "metrics", "safety", "align")
    axes = dict.fromkeys(key for group in groups for key in group.axes if key not in excluded)
    columns = [column for column in dict.fromkeys((*KNOBS, *axes)) if _differs(column, groups)]
    labels = {tuple(group.knob(column) for column in columns) for group in groups}
    if len(labels) == len(groups):
        return columns
    # Some groups differ in no axis, only in other settings.
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    used = ("metrics", *columns, *(column.partition(".")[0] for column in columns))
    others = [key for key in keys if key.split(".")[0] not in used]
    return columns + [key for key in others if _differs(key, groups)]


def _differs(column: str, groups: Sequence[Group]) -> bool:
    return len({group.knob(column) for group in groups}) > 1


def name(group: Group, columns: Sequence[str]) -> str:
    """`badnets, 5 % poisoned, lora`: the group in words, by these columns."""
    words = []
    for column in columns:
        if column not in (*KNOBS, *group.axes) and group.settings.get(column) is None:
            continue  # a part of the recipe that this group leaves at its default
        value = group.knob(column)
        if column == "rate":
            value = f"{value} poisoned"
        if value == "none":
            value = ABSENT.get(column, value)
        words.append(value if column in KNOBS else f"{text.cut(text.line(column), WIDEST)} {value}")
    return ", ".join(words) or group.knob("method")


def headlines(groups: Sequence[Group]) -> list[str]:
    """The metrics with a column of their own, in the order measured."""
    stats = {stat.metric: stat for group in groups for stat in group.stats.values()}
    return [
        stat.metric
        for stat in stats.values()
        if stat.has_column or (stat.of and stat.of not in stats and not stat.part)
        if not _is_repeated(stat, groups)
    ]


def _is_repeated(stat: Stat, groups: Sequence[Group]) -> bool:
    """Whether every group with this number also has it under the name of another metric."""
    metric = declared(stat.family) if stat.role == "headline" else None
    other = metric.repeats if metric else ""
    return bool(other) and all(group.get(other) for group in groups if group.get(stat.metric))


def _stats(cells: Sequence[CellResult]) -> dict[str, Stat]:
    from backfire.results.intervals import stat

    by_metric: dict[str, list[tuple[CellResult, Value]]] = {}
    for cell in cells:
        for value in cell.values:
            by_metric.setdefault(value.metric, []).append((cell, value))
    return {metric: stat(values) for metric, values in by_metric.items()}


def difference(a: Group, b: Group, metric: str, tests: int = 1) -> Gap | None:
    """b - a on the rows and seeds that both have; None if one of them lacks the metric. The
    interval holds for `tests` comparisons at once."""
    # Imported here, since it needs numpy and reading records does not.
    from backfire.results.intervals import gap, level

    return gap(a, b, metric, level(tests))
