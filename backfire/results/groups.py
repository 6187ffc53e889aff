"""Cells that differ only in their seed, taken together; and what tells the groups apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from backfire import text
from backfire.registry import find, names
from backfire.result import CellResult, Role, Unit, Value

if TYPE_CHECKING:
    from backfire.base import Metric, Use

WIDEST: Final = 48
ABSENT: Final = {"attack": "no attack", "method": "not tuned", "defense": "no defense"}
"""What `none` means in the words that name a group."""
KNOBS: Final = ("model", "data", "attack", "rate", "method", "defense")


Scope = Literal["seeds", "model", "untuned", "alignment"]
"""Whose chance an interval holds: that of seeds and rows; of rows, for one trained model; of rows,
since nothing was trained; none, since all seeds start from one model of the defense."""
ALONE: Final = " *"
"""Marks an interval that is of one trained model only."""


@dataclass(frozen=True)
class Stat(Value):
    """One metric of a group of cells: its mean over seeds, their spread (sd), a 95 % interval."""

    spread: float | None = None
    seeds: int = 1
    """Trained models behind it; 1 for an untuned one."""
    scope: Scope = "seeds"

    @property
    def title(self) -> str:
        return text.title(self.name, self.part)

    def number(self, digits: int = 1) -> str:
        """`94.1 %`; of a change `-0.3 points`."""
        if self.is_change and self.value is not None:
            return text.change(self.unit, self.value, digits)
        return text.number(self.unit, self.value, digits)

    @property
    def interval(self) -> str:
        """`[92.0, 95.8]`, with a mark if it is of one trained model only."""
        return _marked(text.interval(self.unit, self.low, self.high), self.scope)

    @property
    def shown(self) -> str:
        """`94.1 % [92.0, 95.8]`, with a mark if it is of one trained model only."""
        return f"{self.number()} {self.interval}".rstrip()

    @property
    def said(self) -> str:
        """`98 % [97, 99]` for a sentence, no finer than the interval; with a mark if it is of one
        trained model only."""
        is_wide = self.low is not None and self.high is not None and self.high - self.low >= 0.015
        digits = 0 if is_wide else 1
        ends = _marked(text.interval(self.unit, self.low, self.high, digits), self.scope)
        return f"{self.number(digits)} {ends}".rstrip()


def _marked(interval: str, scope: Scope) -> str:
    return interval + ALONE if interval and scope == "model" else interval


@dataclass(frozen=True)
class Gap:
    """A difference and its 95 % interval; `p` only where there are several seeds."""

    unit: Unit
    difference: float
    low: float | None
    high: float | None
    p: float | None = None
    n: int | None = None
    """Pairs of outcomes, if it was found row by row."""
    seeds: int = 1
    scope: Scope = "seeds"

    @property
    def is_known(self) -> bool:
        """Whether it says something of other seeds."""
        return self.low is not None and self.scope == "seeds"

    @property
    def is_clear(self) -> bool:
        """Whether zero is left out by an interval that says something of other seeds."""
        low, high = self.low, self.high
        return self.is_known and low is not None and high is not None and not low <= 0 <= high

    @property
    def change(self) -> str:
        """`+47.0 points`."""
        return text.change(self.unit, self.difference)

    @property
    def interval(self) -> str:
        """`[42.8, 51.2]`, with a mark if it is of one trained model only."""
        return _marked(text.interval(self.unit, self.low, self.high), self.scope)

    @property
    def said(self) -> str:
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
        """The cells that have numbers."""
        return [cell for cell in self.cells if cell.is_done]

    @property
    def seeds(self) -> str:
        """`3`, or `2 of 3` where a cell has no numbers; `1` where all cells have one model, and `–`
        where nothing was trained."""
        from backfire.results.intervals import is_trained, model_of, one_alignment

        done, planned = len(self.done), len(self.cells)
        if done and not is_trained(self.done[0]):
            return "–"
        if done > 1 and len({model_of(cell) for cell in self.done}) == 1:
            return "1"
        apart = " (1 alignment)" if done > 1 and one_alignment(*self.done) else ""
        return (str(done) if done == planned else f"{done} of {planned}") + apart

    @property
    def poisoned(self) -> bool:
        return self.rate > 0 and self.attack != "none"

    def said(self, metric: str) -> str:
        """`98 % [97, 99]`: the metric for a sentence, with a mark if it is of one trained model."""
        return self.stats[metric].said

    def beside(self, knob: str) -> dict[str, Any]:
        """The axes that say nothing of this knob."""
        return {key: value for key, value in self.axes.items() if not key.startswith(knob)}

    def get(self, metric: str) -> Stat | None:
        """The metric of this name if it has a value."""
        stat = self.stats.get(metric)
        return stat if stat and stat.value is not None else None

    def side(self, metric: str, role: Role) -> Stat | None:
        """The floor, the excess or the change of a headline, if it has a value."""
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
        known = getattr(self, column) if column in KNOBS else self.settings.get(column)
        return text.cut(text.knob(known), WIDEST)


def group(cells: Iterable[CellResult]) -> list[Group]:
    """The groups, in the order of the cells. A cell of which nothing is known yet is in none."""
    known = [cell for cell in cells if cell.model is not None]
    # Settings tell all; a cell that failed before they were written is placed by its axes.
    names = {
        _place(cell): _hashable(_without_seed(cell.settings)) for cell in known if cell.settings
    }
    together: dict[str, list[CellResult]] = {}
    for cell in known:
        same = _hashable(_without_seed(cell.settings)) if cell.settings else ""
        same = same or names.get(_place(cell)) or _place(cell)
        together.setdefault(same, []).append(cell)
    return [_group(cells) for cells in together.values()]


def _place(cell: CellResult) -> str:
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
    """The metric of this registered name; None if there is none any more."""
    return cast("type[Metric]", find("metrics", family)) if family in names("metrics") else None


def picked(groups: Sequence[Group], use: Use) -> list[str]:
    """The numbers of these groups that their metrics declare for a use, first place first."""
    found: dict[str, int] = {}
    for stat in (stat for group in groups for stat in group.stats.values()):
        metric = declared(stat.family)
        if metric and use in metric.ranks:
            is_headline = stat.role == "headline" and not stat.part
            if stat.metric == metric.picked if metric.picked else is_headline:
                found[stat.metric] = metric.ranks[use]
    return sorted(found, key=found.__getitem__)


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in tables of their own, the largest first: together are those of which one has all
    the metrics of the other, by whatever values. A run about one question is one table."""
    of = {s.metric: s.family or s.metric for group in groups for s in group.stats.values()}
    heads = {value: of[value] for value in headlines(groups)}
    found = list[tuple[list[Group], list[frozenset[str]]]]()
    blank = [group for group in groups if not group.done]
    for group in (group for group in groups if group.done):
        has = frozenset(metric for value, metric in heads.items() if group.get(value))
        near = [f for f in found if any(has <= other or other <= has for other in f[1])]
        members, sets = [group], [has]
        for family in near:
            found.remove(family)
            members, sets = [*family[0], *members], [*family[1], *sets]
        found.append((members, sets))
    for group in blank:  # where nothing was measured, data and attack say what was asked
        like = [f[0] for f in found if any(_asks(group) == _asks(other) for other in f[0])]
        if like or found:
            (like or [found[0][0]])[0].append(group)
        else:
            found.append(([group], []))
    place = {id(group): number for number, group in enumerate(groups)}
    ordered = [sorted(members, key=lambda g: place[id(g)]) for members, _ in found]
    return sorted(ordered, key=lambda members: (-len(members), place[id(members[0])]))


def _asks(group: Group) -> tuple[str, str]:
    return group.data, group.attack


def columns_of(groups: Sequence[Group]) -> dict[int, list[str]]:
    """By the `id` of each group the columns that name it: those that tell it from others of its
    family, and before them those that tell the families apart."""
    found = families(groups)
    between = [c for c in ("data", "attack") if found[1:] and _differs(c, groups)]
    return {
        id(group): list(dict.fromkeys((*between, *own)))
        for family in found
        for own in [varying(family)]
        for group in family
    }


def varying(groups: Sequence[Group]) -> list[str]:
    """The knobs by which these groups differ: the columns that name a row."""
    # The rate has a column, as has the defense with its null control; what is measured, and what
    # comes with a defense, tells no cells apart.
    apart = ("attack.rate", "defense.null", "metrics", "safety", "align")
    axes = dict.fromkeys(key for group in groups for key in group.axes if key not in apart)
    found = [column for column in dict.fromkeys((*KNOBS, *axes)) if _differs(column, groups)]
    labels = {tuple(group.knob(column) for column in found) for group in groups}
    if len(labels) == len(groups):
        return found
    # No axis tells these apart, so whatever setting does must.
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    told = ("metrics", *found, *(column.partition(".")[0] for column in found))
    return found + [key for key in keys if key.split(".")[0] not in told and _differs(key, groups)]


def _differs(column: str, groups: Sequence[Group]) -> bool:
    return len({group.knob(column) for group in groups}) > 1


def name(group: Group, columns: Sequence[str]) -> str:
    """`badnets, 5 % poisoned, lora`: the group in words, by these columns."""
    words = []
    for column in columns:
        value = group.knob(column)
        if column == "rate":
            value = f"{value} poisoned"
        if value == "none":
            value = ABSENT.get(column, value)
        words.append(value if column in KNOBS else f"{text.cut(text.line(column), WIDEST)} {value}")
    return ", ".join(words) or group.knob("method")


def headlines(groups: Sequence[Group]) -> list[str]:
    """The metrics that get a column: no parts, no companions of another, in the order measured."""
    stats = {stat.metric: stat for group in groups for stat in group.stats.values()}
    return [
        stat.metric
        for stat in stats.values()
        if stat.has_column or (stat.of and stat.of not in stats and not stat.part)
        if not _is_repeated(stat, groups)
    ]


def _is_repeated(stat: Stat, groups: Sequence[Group]) -> bool:
    """Whether every group that has this number has it under the name of another metric too."""
    metric = declared(stat.family) if stat.role == "headline" else None
    other = metric.repeats if metric else ""
    return bool(other) and all(group.get(other) for group in groups if group.get(stat.metric))


def _stats(cells: Sequence[CellResult]) -> dict[str, Stat]:
    from backfire.results.intervals import stat

    found: dict[str, list[tuple[CellResult, Value]]] = {}
    for cell in cells:
        for value in cell.values:
            found.setdefault(value.metric, []).append((cell, value))
    return {metric: stat(known) for metric, known in found.items()}


def difference(a: Group, b: Group, metric: str, tests: int = 1) -> Gap | None:
    """b less a, on the rows and the seeds that both have; None if one of them lacks the metric. The
    interval holds for so many `tests` at once."""
    # It needs numpy, which who only reads records does not wait for.
    from backfire.results.intervals import gap, level

    return gap(a, b, metric, level(tests))
