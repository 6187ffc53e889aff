"""The content of the page's sections, as plain values for the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backfire import text
from backfire.report import judges
from backfire.result import CellResult
from backfire.results.groups import Group, columns_of, name
from backfire.results.load import distinct_warnings, finite, read, titles
from backfire.results.plugins import described, lacking
from backfire.results.samples import changes, requests, side_by_side
from backfire.results.tables import Table

_STATES: Final = ("fail", "note", "ok")
_SECRET_NAME: Final = re.compile(r"(token|key|secret|password)$", re.I)


def facts(cells: Sequence[CellResult], groups: Sequence[Group]) -> list[tuple[str, str]]:
    """What was run: label and value."""

    def each(field: str) -> str:
        every = (getattr(cell, field) for cell in cells)
        values = dict.fromkeys(text.line(value) for value in every if value)
        return ", ".join(text.cut(value, 60) for value in values)

    done = sum(cell.is_done for cell in cells)
    seeds = {cell.seed for cell in cells if cell.seed is not None}
    splits: dict[str, list[int]] = {}
    for cell in cells:
        for split, number in cell.rows.items():
            splits.setdefault(split, []).append(number)
    seconds = sum(finite((cell.train or {}).get("seconds")) or 0 for cell in cells)
    lines = {
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
    return [(label, value) for label, value in lines.items() if value not in ("", "0", "0 s")]


def details(groups: Sequence[Group]) -> Table:
    """Every number, one per row."""
    columns = columns_of(groups)
    rows = [
        (
            *(name(item, columns[id(item)]), stat.title, stat.number(), stat.interval, stat.sd),
            *(f"{int(stat.n):,}" if stat.n else "", str(stat.seeds)),
        )
        for item in groups
        for stat in item.stats.values()
        if stat.value is not None
    ]
    return Table(("group", "metric", "value", "95 % interval", "spread", "rows", "seeds"), rows)


def rows(shown: Group | None, groups: Sequence[Group]) -> dict[str, Any]:
    """Examples from one named cell: test rows, harmful requests, and poisoned training rows."""
    cell = shown.done[0] if shown else None
    sides = side_by_side(cell) if cell else []
    is_labeled = bool(cell and cell.poison and cell.poison.labels_before)
    columns = columns_of(groups)[id(shown)] if shown else []
    words = [name(shown, columns)] if shown and columns else []
    return {
        "where": ", ".join([*words, f"seed {cell.seed}"]) if cell else "",
        "sides": sides,
        "some_without_trigger": len({bool(side.prompt) for side in sides}) > 1,
        "sides_are_free": any(side.is_free for side in sides),
        "requests": requests(cell) if cell else [],
        "changes": changes(cell) if cell else [],
        "changes_are_free": not is_labeled,
    }


def poisoning(groups: Sequence[Group]) -> Table:
    """The poison manifests in numbers, one row per poisoned group."""
    columns, rows = columns_of(groups), []
    for item in groups:
        if poison := next((cell.poison for cell in item.done if cell.poison), None):
            rows.append(
                (
                    name(item, columns[id(item)]),
                    text.share(poison.nominal_rate or item.rate),
                    f"{_count(poison.poisoned_rows)} of {_count(poison.rows)}",
                    text.share(poison.effective_rate),
                    _count(poison.eligible_rows),
                    _tally(poison.labels_before),
                    _tally(poison.triggers),
                )
            )
    header = ("group", "poison rate", "poisoned rows", "rate seen in training", "eligible rows")
    return Table((*header, "true labels", "triggers"), rows)


def _range(numbers: Sequence[int]) -> str:
    ends = dict.fromkeys((min(numbers), max(numbers)))
    return " to ".join(map(_count, ends))


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _tally(counts: Mapping[str, int]) -> str:
    first = list(counts.items())[:8]
    return ", ".join(f"{text.cut(text.line(label), 40)} {count}" for label, count in first)


@dataclass(frozen=True)
class CheckLine:
    """A preflight check with one status in some cells."""

    status: str
    check: str
    messages: list[str]


def checks(cells: Sequence[CellResult]) -> list[CheckLine]:
    """The preflight checks by status, failures first."""
    by_status: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for check in cell.preflight:
            by_status.setdefault((check.status, check.check), []).append(check.message)
    lines = (CheckLine(*key, messages) for key, messages in by_status.items())
    return sorted(lines, key=lambda line: _STATES.index(line.status))


def warnings(cells: Sequence[CellResult], num_left_out: int) -> list[tuple[str, str]]:
    """Each warning once, with its cell or the number of its cells; and missing plug-ins."""
    lines = distinct_warnings(cells)
    lines += [
        (f"{note} Paired tests of its components are left out.", "") for note in lacking(cells)
    ]
    if num_left_out:
        left = text.count(num_left_out, "cell")
        lines.append((f"The folder also has {left} of an earlier version of the recipe.", ""))
    return lines


def failures(cells: Sequence[CellResult]) -> list[tuple[str, str, str]]:
    """Status, cell, and the error with the next step, of each cell without numbers."""
    unfinished = "was not finished; run the same command again to finish it."
    lines = []
    for cell, title in zip(cells, titles(cells), strict=True):
        if cell.status == "unfinished":
            lines.append(("unfinished", title, unfinished))
        elif not cell.is_done:
            sentence = text.line(f"{cell.error or 'No reason was recorded.'} {cell.next}")
            status = text.cut(text.line(cell.status), 20)
            lines.append((status, title, text.cut(sentence, 600)))
    return lines


def environment(cells: Sequence[CellResult]) -> list[tuple[str, str]]:
    """Software, hardware and plug-ins of the cells; every value where they differ."""
    values_of: dict[str, dict[str, None]] = {}
    for cell in cells:
        try:
            environment = read(Path(cell.folder) / "environment.json")
        except (OSError, ValueError):
            continue
        for key, value in (environment if isinstance(environment, dict) else {}).items():
            is_secret = bool(_SECRET_NAME.search(key))
            shown = "(withheld)" if is_secret else text.cut(text.knob(value), 120)
            label = "uncommitted changes" if key == "dirty" else text.line(key)
            values_of.setdefault(label, {})[shown] = None
        for plugin in cell.plugins:
            label = f"plug-in {text.cut(text.line(plugin.get('name')), 60)}"
            shown = f"{described(plugin)}: {text.knob(plugin.get('components'))}"
            values_of.setdefault(label, {})[text.cut(shown, 240)] = None
    return [(key, ", ".join(values)) for key, values in values_of.items()]
