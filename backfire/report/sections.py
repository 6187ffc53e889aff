"""What each section of the page shows, as plain values for the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from backfire import text
from backfire.report import judges
from backfire.result import CellResult
from backfire.results.groups import (
    Group,
    Stat,
    columns_of,
    families,
    headlines,
    name,
)
from backfire.results.load import read
from backfire.results.plugins import described, lacking
from backfire.results.samples import changes, requests, side_by_side

_STATES: Final = ("fail", "note", "ok")
_SECRET_NAME: Final = re.compile(r"(token|key|secret|password)$", re.I)


def facts(cells: Sequence[CellResult], groups: Sequence[Group]) -> list[tuple[str, str]]:
    """What was run, in a line."""

    def each(field: str) -> str:
        known = (getattr(cell, field) for cell in cells)
        values = dict.fromkeys(text.line(value) for value in known if value)
        return ", ".join(text.cut(value, 60) for value in values)

    done = sum(cell.is_done for cell in cells)
    seeds = {cell.seed for cell in cells if cell.seed is not None}
    splits: dict[str, list[int]] = {}
    for cell in cells:
        for split, number in cell.rows.items():
            splits.setdefault(split, []).append(number)
    seconds = sum((cell.train or {}).get("seconds") or 0 for cell in cells)
    found = {
        "Model": each("model"),
        "Data": each("data"),
        "Rows": ", ".join(f"{_range(numbers)} {split}" for split, numbers in splits.items()),
        "Template": each("template"),
        "Harmful score": judges.measure(cells),
        "Cells": f"{done} of {len(cells)} done" if done < len(cells) else f"{done}, all done",
        "Groups": str(len(groups)),
        "Seeds": str(len(seeds)),
        "Training": f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s",
    }
    return [(label, value) for label, value in found.items() if value not in ("", "0", "0 s")]


def numbers(groups: Sequence[Group]) -> dict[str, Any]:
    """The tables: a line per group, a column per headline metric."""
    return {
        "has_seeds": any(len(item.done) > 1 for item in groups),
        "tables": [
            table for family in families(groups) if (table := _table(family, groups))["metrics"]
        ],
    }


def _table(family: Sequence[Group], groups: Sequence[Group]) -> dict[str, Any]:
    columns, metrics = columns_of(groups)[id(family[0])], headlines(family)
    rows = []
    for item in family:
        floors = [item.side(metric, "floor") for metric in metrics]
        stats = [item.get(metric) for metric in metrics]
        shown = [_number(stat, floor) for stat, floor in zip(stats, floors, strict=True)]
        knobs = [item.knob(column) for column in columns]
        rows.append({"knobs": knobs, "cells": shown, "seeds": item.seeds})
    return {
        "knobs": [text.line(column).removeprefix("attack.") for column in columns],
        "metrics": [text.title(metric) for metric in metrics],
        "rows": rows,
    }


def _number(stat: Stat | None, floor: Stat | None = None) -> dict[str, Any] | None:
    """A number as a table shows it; `bar` is where its interval lies on 0 to 100 %."""
    if stat is None or stat.value is None:
        return None
    bar = None
    is_share = stat.unit == "share" and not stat.is_change
    if is_share and stat.low is not None and stat.high is not None:
        ends = (stat.low, max(0.01, stat.high - stat.low), stat.value)
        bar = [f"{100 * end:.1f}" for end in ends]
    return {
        "value": stat.number(),
        "interval": stat.interval,
        "spread": "" if stat.spread is None else f"sd {replace(stat, value=stat.spread).number()}",
        "n": f"n {int(stat.n):,}" if stat.n else "",
        "floor": floor.number() if floor else "",
        "bar": bar,
    }


def details(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every number there is, one a line."""
    columns, found = columns_of(groups), []
    for item in groups:
        for stat in item.stats.values():
            if shown := _number(stat):
                place = {"group": name(item, columns[id(item)]), "metric": stat.title}
                found.append({**place, "seeds": stat.seeds, **shown})
    return found


def rows(shown: Group | None, groups: Sequence[Group]) -> dict[str, Any]:
    """Unseen rows side by side and poisoned rows before and after, from one cell that is named."""
    cell = shown.done[0] if shown else None
    sides = side_by_side(cell) if cell else []
    is_labeled = bool(cell and cell.poison and cell.poison.labels_before)
    columns = columns_of(groups)[id(shown)] if shown else []
    words = [name(shown, columns)] if shown and columns else []
    return {
        "where": ", ".join([*words, f"seed {cell.seed}"]) if cell else "",
        "sides": sides,
        "sides_are_free": any(side.is_free for side in sides),
        "requests": requests(cell) if cell else [],
        "changes": changes(cell) if cell else [],
        "changes_are_free": not is_labeled,
    }


def doses(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The poison manifests in numbers, one line per group that has one."""
    columns, found = columns_of(groups), []
    for item in groups:
        poison = next((cell.poison for cell in item.done if cell.poison), None)
        if not poison:
            continue
        line = {
            "group": name(item, columns[id(item)]),
            "nominal": text.share(poison.nominal_rate or item.rate),
            "poisoned": f"{_count(poison.poisoned_rows)} of {_count(poison.rows)}",
            "effective": text.share(poison.effective_rate),
            "eligible": _count(poison.eligible_rows),
            "labels": _tally(poison.labels_before),
            "triggers": _tally(poison.triggers),
        }
        found.append(line)
    return found


def _range(numbers: Sequence[int]) -> str:
    ends = dict.fromkeys((min(numbers), max(numbers)))
    return " to ".join(map(_count, ends))


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _tally(counts: Mapping[str, int]) -> str:
    known = list(counts.items())[:8]
    return ", ".join(f"{text.cut(text.line(label), 40)} {count}" for label, count in known)


def checks(cells: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Each preflight check once for every way it ended, failures first; with the last message."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for check in cell.preflight:
            found.setdefault((check.status, check.check), []).append(check.message)
    lines = sorted(found.items(), key=lambda item: _STATES.index(item[0][0]))
    return [
        {
            "status": status,
            "check": check,
            "message": messages[-1],
            "times": len(messages),
            "varies": len(set(messages)) > 1,
        }
        for (status, check), messages in lines
    ]


def warnings(cells: Sequence[CellResult], num_left_out: int) -> list[tuple[str, str]]:
    """Each warning once, with the cell that gave it or the number of those that did; and the
    plug-ins that are not here any more."""
    given: dict[str, list[str]] = {}
    for cell in cells:
        for warning in cell.warnings:
            given.setdefault(text.cut(text.line(warning), 400), []).append(cell.slug)
    said = [
        (warning, by[0] if len(by) == 1 else text.count(len(by), "cell"))
        for warning, by in given.items()
    ]
    said += [
        (f"{sentence} Tests row by row of its components are left out.", "")
        for sentence in lacking(cells)
    ]
    if num_left_out:
        left = text.count(num_left_out, "cell")
        said.append((f"{left} of an earlier version of the recipe lie here too; left out.", ""))
    return said


def failures(cells: Sequence[CellResult]) -> list[tuple[str, str, str]]:
    """Exit class, cell, and what happened with the next step."""
    unfinished = "was not finished; run the same command again to finish it."
    found = []
    for cell in cells:
        if cell.status == "unfinished":
            found.append(("unfinished", cell.slug, unfinished))
        elif not cell.is_done:
            said = text.line(f"{cell.error or 'No reason was written.'} {cell.next}")
            found.append((text.cut(text.line(cell.status), 20), cell.slug, text.cut(said, 600)))
    return found


def stages(cell: CellResult) -> list[tuple[str, str]]:
    """The keys of the stages behind a cell."""
    return [(stage, key) for stage, key in cell.keys.items() if key]


def environment(cells: Sequence[CellResult]) -> list[tuple[str, str]]:
    """What the cells ran on; where they differ, every value."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        try:
            environment = read(Path(cell.folder) / "environment.json")
        except (OSError, ValueError):
            continue
        for key, value in (environment or {}).items():
            is_secret = bool(_SECRET_NAME.search(key))
            shown = "(withheld)" if is_secret else text.cut(text.knob(value), 120)
            label = "uncommitted changes" if key == "dirty" else text.line(key)
            found.setdefault(label, {})[shown] = None
        for plugin in cell.plugins:
            label = f"plug-in {text.cut(text.line(plugin.get('name')), 60)}"
            shown = f"{described(plugin)}: {text.knob(plugin.get('components'))}"
            found.setdefault(label, {})[text.cut(shown, 240)] = None
    return [(key, ", ".join(values)) for key, values in found.items()]
