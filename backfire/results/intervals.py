"""Means over seeds and differences of groups, with 95 % intervals.

With several seeds, the interval crosses seeds and the rows that all of them share
(`evaluate.seeds`). For one trained model it is over rows only, and there is no p. An untuned model
has no seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Final

import numpy as np

from backfire import text
from backfire.base import AlignDefense
from backfire.evaluate.seeds import LEVEL, SHARE, Crossed, crossed, difference_pads, ratio
from backfire.evaluate.stats import Floats, Spread, Z, over_seeds
from backfire.registry import find, names
from backfire.result import CellResult, Unit, Value
from backfire.results.groups import Gap, Group, Scope, Stat, declared
from backfire.results.pairs import Rows, listed, outcomes_by_row, versions_of

NEAR: Final = 1e-6
"""Relative and absolute tolerance when a number is compared with the mean of its rows."""


def stat(measured: Sequence[tuple[CellResult, Value]], level: float = LEVEL) -> Stat:
    """One metric of a group, from the value of each cell that has it."""
    every = [value for _, value in measured]
    values = [value for value in every if value.value is not None]
    cells = [cell for cell, value in measured if value.value is not None]
    models = {model_of(cell) for cell in cells}
    first = vars((values or every)[0]) | {"n": max(value.n for value in every)}
    if len(models) < 2:
        ends = {end: _mean([getattr(v, end) for v in values]) for end in ("value", "low", "high")}
        scope: Scope = "model" if cells and is_trained(cells[0]) else "untuned"
        return Stat(**(first | ends), seeds=len(models), scope=scope)
    numbers = [value.value for value in values if value.value is not None]
    spread = over_seeds(numbers, level)
    open_ended = {"value": spread.mean, "spread": spread.sd, "low": None, "high": None}
    whole = Stat(**(first | open_ended), seeds=len(models))
    if one_alignment(cells[0]):
        return replace(whole, scope="alignment")
    if len({*numbers}) < 2 and all(value.low is None for value in values):
        return whole  # such as a number of parameters, which does not vary by chance
    table = _table([outcomes_by_row(cell, whole.metric) for cell in cells])
    if table is not None and np.allclose(table.mean(axis=1), numbers, rtol=NEAR, atol=NEAR):
        low, high = crossed(table, pads=_pads(whole, table)).interval(level)
    else:
        low, high = _widest(spread, values, level)
    limits = [value.limits for value in every]
    least, most = min(low for low, _ in limits), max(high for _, high in limits)
    return replace(whole, low=max(low, least), high=min(high, most))


def _widest(spread: Spread, values: Sequence[Value], level: float) -> tuple[float, float]:
    """The wider of Student's interval over seeds and the mean of the seeds' own intervals: without
    the rows, their share of the variance is unknown."""
    from scipy.special import ndtri

    assert spread.low is not None and spread.high is not None
    own = [(v.low, v.high) for v in values if v.low is not None and v.high is not None]
    if not own:
        return spread.low, spread.high
    wider = float(ndtri((1 + level) / 2)) / Z
    below, above = (
        wider * (math.fsum(ends) / len(own) - spread.mean) for ends in zip(*own, strict=True)
    )
    return min(spread.low, spread.mean + below), max(spread.high, spread.mean + above)


def gap(a: Group, b: Group, metric: str, level: float = LEVEL, *, exact: bool = True) -> Gap | None:
    """b - a on the rows and seeds that both have; None if one lacks the metric, or if they used
    different versions of it and the rows were not stored. If `exact`, row by row only where the
    means of the rows are the cells' own numbers."""
    ours, theirs = a.get(metric), b.get(metric)
    if ours is None or theirs is None or ours.value is None or theirs.value is None:
        return None
    is_one_version = len(versions_of((*a.done, *b.done), ours.family)) < 2
    if is_one_version and one_alignment(*a.done, *b.done) and max(ours.seeds, theirs.seeds) > 1:
        return Gap(ours.unit, theirs.value - ours.value, None, None, scope="alignment")
    pairs = [pair for pair in _pairs(a, b) if all(cell.find(metric) for cell in pair)]
    if not pairs:
        return unpaired(ours, theirs) if is_one_version else None
    sides = [[outcomes_by_row(cell, metric) for cell in side] for side in zip(*pairs, strict=True)]
    both = [_shared(x, y) for x, y in zip(*sides, strict=True)]
    if not is_one_version:  # only outcomes recomputed by today's version are subtracted
        return _paired(ours.unit, both, _scope(pairs), level) if all(both) else None
    changes = [_number(y, metric) - _number(x, metric) for x, y in pairs]
    if all(both):
        means = [sum(y - x for x, y in rows.values()) / len(rows) for rows in both]
        if not exact or np.allclose(means, changes, rtol=NEAR, atol=NEAR):
            return _paired(ours.unit, both, _scope(pairs), level)
    if max(changes) - min(changes) < NEAR:  # one pair, or no spread to estimate an interval from
        return unpaired(ours, theirs)
    return _gap(ours.unit, crossed(np.array(changes)[:, None]), _scope(pairs), None, level)


def _paired(
    unit: Unit, both: Sequence[Mapping[str, tuple[float, float]]], scope: Scope, level: float
) -> Gap:
    """The difference from each pair of models' row id -> the outcomes of both."""
    n = sum(map(len, both))
    is_binary = all(one in (0, 1) for rows in both for pair in rows.values() for one in pair)
    result = _gap(unit, differences(both), scope, n, level)
    if is_binary and result.low is not None and result.high is not None:
        return replace(result, low=max(result.low, -1.0), high=min(result.high, 1.0))
    return result


def differences(both: Sequence[Mapping[str, tuple[float, float]]]) -> Crossed:
    """The mean of second minus first. If each seed has its own rows (such as canaries), a seed is
    one draw of model and rows together."""
    changes: list[Rows] = [{id: (0, y - x) for id, (x, y) in rows.items()} for rows in both]
    is_binary = all(one in (0, 1) for rows in both for pair in rows.values() for one in pair)
    pads = difference_pads(len(both)) if is_binary else ()
    table = _table(changes)
    if table is not None:
        return crossed(table, pads=pads)
    means = [sum(change for _, change in rows.values()) / len(rows) for rows in changes]
    n = sum(map(len, changes))
    open_end = 2 / (n + 2) ** 2 if is_binary else 0.0  # as with the pads above
    return replace(
        crossed(np.array(means)[:, None]), rows=n, row_variance=open_end, row_df=math.inf
    )


def _gap(unit: Unit, change: Crossed, scope: Scope, n: int | None, level: float) -> Gap:
    low, high = change.interval(level)
    p = change.p if scope == "seeds" else None
    return Gap(unit, change.value, low, high, p, n, change.seeds, scope)


def level(tests: int) -> float:
    """Level of intervals that hold for this many tests at once (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(tests, 1)


def at(group: Group, metric: str, tests: int) -> Stat | None:
    """The group's metric with an interval that holds for this many tests at once."""
    if tests < 2 or not group.get(metric):
        return group.get(metric)
    return stat([(c, v) for c in group.done if (v := c.find(metric))], level(tests))


def part_removed(
    before: Group, after: Group, metric: str, level: float = LEVEL
) -> tuple[float, float] | None:
    """The interval of (before - after) / (before - floor), all three on the same rows and seeds;
    None if the rows are missing or the difference from the floor is not clearly above 0."""
    pairs, reference = _pairs(before, after), before.side(metric, "floor")
    if not pairs or reference is None or one_alignment(*(cell for pair in pairs for cell in pair)):
        return None
    tops, bottoms = list[Rows](), list[Rows]()
    for first, second in pairs:
        ours, floor = outcomes_by_row(first, metric), outcomes_by_row(first, reference.metric)
        both = _shared(outcomes_by_row(second, metric), ours)
        tops.append({id: (0, x - y) for id, (y, x) in both.items() if id in floor})
        bottoms.append({id: (0, x - floor[id][1]) for id, (_, x) in both.items() if id in floor})
    top, bottom = _table(tops), _table(bottoms)
    if top is None or bottom is None:
        return None
    pads = difference_pads(len(pairs))
    if crossed(bottom, pads=pads).interval(level)[0] <= 0:
        return None
    near = float(top.mean() / bottom.mean())
    low, high = ratio(lambda r: crossed(top - r * bottom, pads=pads), near, level)
    return low, high


def unpaired(a: Stat, b: Stat) -> Gap:
    """b - a without pairs: Newcombe's square-and-add of both intervals (1998, method 10 without
    its correlation)."""
    assert a.value is not None and b.value is not None
    change = b.value - a.value
    least = min((s for s in (a, b) if s.scope != "untuned"), key=lambda s: s.seeds, default=a)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Gap(a.unit, change, None, None, seeds=least.seeds, scope=least.scope)
    below = math.hypot(b.value - b.low, a.high - a.value)
    above = math.hypot(b.high - b.value, a.value - a.low)
    ends = (change - below, change + above)
    return Gap(a.unit, change, *ends, None, None, least.seeds, least.scope)


def _pairs(a: Group, b: Group) -> list[tuple[CellResult, CellResult]]:
    """A cell of each side for every model: by seed, or in order if no seed is shared. An untuned
    model is paired with each of the other side's."""
    first, second = ({cell.seed: cell for cell in side.done} for side in (a, b))
    if not first or not second:
        return []
    ones = [len({model_of(cell) for cell in side.values()}) == 1 for side in (first, second)]
    seeds = [seed for seed in second if seed in first]
    if ones[0] and not is_trained(a.done[0]):
        pairs = [(first.get(seed, a.done[0]), cell) for seed, cell in second.items()]
    elif ones[1] and not is_trained(b.done[0]):
        pairs = [(cell, second.get(seed, b.done[0])) for seed, cell in first.items()]
    elif seeds:
        pairs = [(first[seed], second[seed]) for seed in seeds]
    else:
        pairs = list(zip(first.values(), second.values(), strict=False))
    by_models = {(model_of(x), model_of(y)): (x, y) for x, y in reversed(pairs)}
    return list(reversed(by_models.values()))


def _scope(pairs: Sequence[tuple[CellResult, CellResult]]) -> Scope:
    """What the pairs cover: other seeds only if every trained side has several models."""
    sides = [side for side in zip(*pairs, strict=True) if is_trained(side[0])]
    if not sides:
        return "untuned"
    return "seeds" if all(len({model_of(c) for c in side}) > 1 for side in sides) else "model"


def _shared(a: Rows, b: Rows) -> dict[str, tuple[float, float]]:
    """Outcomes of both on the rows where both got the same prompt."""
    return {id: (a[id][1], y) for id, (prompt, y) in b.items() if id in a and a[id][0] == prompt}


def _table(rows: Sequence[Rows]) -> Floats | None:
    """Outcomes [seeds, rows] on the rows that all seeds have; None if under half are."""
    ids = [id for id in rows[0] if all(id in other for other in rows)]
    if not ids or 2 * len(ids) < max(map(len, rows)):
        return None
    return np.array([[one[id][1] for id in ids] for one in rows])


def _pads(stat: Stat, table: Floats) -> tuple[float, ...]:
    if stat.is_change:
        return difference_pads(len(table)) if np.isin(table, (-1, 0, 1)).all() else ()
    return SHARE if np.isin(table, (0, 1)).all() else ()


def _number(cell: CellResult, metric: str) -> float:
    value = cell.find(metric)
    assert value is not None and value.value is not None
    return value.value


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if there is no value or one is missing."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present and len(present) == len(values) else None


# ------------------------------------------------------------------------- models behind a cell


def model_of(cell: CellResult) -> str:
    """Key of the trained model: cells that share it have one model, whatever their seed."""
    if not is_trained(cell):
        return "untuned"
    return str(cell.keys.get("tuned") or f"seed {cell.seed}")


def is_trained(cell: CellResult) -> bool:
    """Whether another seed would give another model."""
    return cell.method not in ("none", None) or _aligning(cell)


def one_alignment(*cells: CellResult) -> bool:
    """Whether all seeds start from one model that a defense aligned."""
    return any(_aligning(cell) and cell.settings.get("align.seed") is not None for cell in cells)


def _aligning(cell: CellResult) -> bool:
    """Whether a defense acts in the alignment stage."""
    specs = cell.settings.get("defense")
    if not isinstance(specs, list) or not any(key.startswith("align.") for key in cell.settings):
        return False
    parts = [str(spec.get("name") if isinstance(spec, dict) else spec) for spec in specs]
    return any(map(_acts_in_alignment, parts))


@cache
def _acts_in_alignment(defense: str) -> bool:
    return defense in names("defenses") and issubclass(find("defenses", defense), AlignDefense)


def notes(groups: Sequence[Group]) -> Iterator[str]:
    """Notes on the intervals of these groups, a sentence each."""
    stats = [stat for group in groups for stat in group.stats.values()]
    if any(stat.scope == "model" and stat.low is not None for stat in stats):
        yield (
            "* One seed: this model only. The interval is over test rows; another seed may lie "
            "outside it."
        )
    cells = [cell for group in groups for cell in group.done]
    for family in dict.fromkeys(stat.family for stat in stats):
        versions, metric = versions_of(cells, family), declared(family)
        if metric and versions - {metric.version}:
            yield (
                f"{family.replace('-', ' ')}: values are from version {listed(versions)} of the "
                f"metric, paired differences are computed by version {metric.version}."
            )
    fixed = [group for group in groups if len(group.done) > 1 and one_alignment(*group.done)]
    if fixed:
        which = text.listing(dict.fromkeys(text.line(group.defense) for group in fixed))
        yield (
            f"{which}: align.seed is set, so all seeds start from one aligned model. That is n = 1 "
            "alignment: no interval and no p."
        )
    packed = dict.fromkeys(text.line(group.method) for group in groups if _is_quantized(group))
    if packed:
        yield (
            f"{text.listing(packed)}: the untuned model that these are compared with is not "
            "quantized, so differences from it include the effect of quantization."
        )
    shared = [g for g in groups if len(g.done) > 1 and g.settings.get("align.data.name")]
    if any(not _aligning(group.done[0]) for group in shared):
        yield (
            "Without a defense in the alignment stage, all seeds start from one aligned model: "
            "intervals are conditional on it."
        )


def _is_quantized(group: Group) -> bool:
    """Whether the base of these cells was quantized in training and evaluation."""
    if group.method not in names("methods"):  # of a plug-in that is not here
        return False
    return bool(find("methods", group.method).make({}).quantization("cpu"))
