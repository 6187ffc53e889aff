"""Comparison of two cells or two runs: settings that differ, and differences of the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire import text
from backfire.errors import UserError
from backfire.evaluate.seeds import holm
from backfire.result import CellResult
from backfire.results.groups import ONE_SEED, Gap, Group, Stat, difference, group, name, varying
from backfire.results.load import cell, load
from backfire.results.pairs import pair, version_notes

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Knob:
    """A setting that differs; `key` is dotted as in a recipe."""

    key: str
    a: str
    b: str


@dataclass(frozen=True)
class Difference:
    """One metric of both sides, and b - a. `pairs` is the number of prompts if both answered the
    same ones and were compared one by one; `p`, corrected for all lines (Holm 1979), needs several
    seeds on both sides."""

    where: str
    a: Stat
    b: Stat
    gap: Gap
    p: float | None = None
    pairs: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Settings and metrics of both sides."""

    a: str
    b: str
    knobs: tuple[Knob, ...]
    numbers: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(a: Path, b: Path, *, force: bool = False) -> Comparison:
    """Compare two cell folders, prompt by prompt where they answered the same ones; or two run
    folders, group by group.

    Raises:
        UserError: one is a cell and the other a run, one has no numbers, or their templates differ
            (unless `force`).
    """
    if _is_run(a) != _is_run(b):
        raise UserError("One is a run and the other a cell; compare two runs or two cells.")
    return _runs(a, b, force) if _is_run(a) else _cells(a, b, force)


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison: settings, numbers, notes."""
    from rich.console import Console

    from backfire.terminal import put, say

    console = console or Console()
    lines = [f"a: {comparison.a}", f"b: {comparison.b}", *comparison.notes]
    if comparison.knobs:
        knobs = [[knob.key, knob.a, knob.b] for knob in comparison.knobs]
        put(["setting", "a", "b"], knobs, console)
    else:
        lines.append("No setting differs.")
    header = ["metric", "a", "b", "difference", "p (Holm)"]
    tables: dict[str, list[list[str]]] = {}
    for item in comparison.numbers:
        tables.setdefault(item.where, []).append(_line(item))
    if [*tables] != [""] and not console.is_terminal:  # one table, for other programs
        rows = [[where, *row] for where, lines_of in tables.items() for row in lines_of]
        put(["group", *header], rows, console, right=range(2, 6))
        tables = {}
    for where, lines_of in tables.items():
        if where:
            console.print()
            say(where, console)
        put(header, lines_of, console, right=range(1, 5))
    for line in lines:
        say(line, console)


def _line(item: Difference) -> list[str]:
    return [item.a.title, item.a.shown, item.b.shown, item.gap.shown, text.chance(item.p)]


def _is_run(path: Path) -> bool:
    if not path.is_dir():
        raise UserError(f"No such folder: {path}.")
    return (path / "cells").is_dir()


# ----------------------------------------------------------------------------------- two cells


def _cells(a: Path, b: Path, force: bool) -> Comparison:
    first, second = cell(a), cell(b)
    for side, path in ((first, a), (second, b)):
        if not side.is_done:
            raise UserError(f"{path} has no numbers ({side.status}).")
    notes = _templates(first, second, force)
    paired, more = pair(first, second)
    notes += more
    numbers = []
    notes += version_notes([first], [second], paired)
    for item in _side_by_side(group([first])[0], group([second])[0], ""):
        # A part (such as a language) has no paired test of its own.
        is_whole = item.a.role == "headline" and not item.a.part
        test = paired.get(item.a.family) if is_whole else None
        if test:
            ends = (test.difference, test.low, test.high)
            gap = Gap(item.a.unit, *ends, n=test.n, scope=item.gap.scope)
            item = replace(item, gap=gap, pairs=test.n)
        numbers.append(item)
    if any(item.gap.scope == "model" for item in numbers):
        notes.append(f"{ONE_SEED.strip()} One seed each: these two models only, so there is no p.")
    return Comparison(
        a=first.slug,
        b=second.slug,
        knobs=_knobs(first.settings, second.settings),
        numbers=tuple(numbers),
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------------ two runs


def _runs(a: Path, b: Path, force: bool) -> Comparison:
    """Compare the groups that have the same name."""
    first, second = load(a), load(b)
    notes = _templates(first[0], second[0], force)
    ours, theirs = group(first), group(second)
    # Groups are named by what differs within a run; other settings are listed once for all.
    columns = list(dict.fromkeys([*varying(ours), *varying(theirs)]))
    by_name = {name(item, columns): item for item in theirs}
    named = [(name(item, columns), item) for item in ours]
    pairs = [(where, item, by_name[where]) for where, item in named if where in by_name]
    both = (number for where, x, y in pairs for number in _side_by_side(x, y, where))
    numbers = [number for number in both if not number.a.part]
    tested = {number.a.family for number in numbers if number.pairs}
    sides = [[cell for side in both for cell in side.done] for both in (ours, theirs)]
    notes += version_notes(sides[0], sides[1], tested)
    if not numbers:
        raise UserError("The two runs have no group with numbers in common.")
    corrected = holm([number.gap.p for number in numbers])
    numbers = [replace(number, p=p) for number, p in zip(numbers, corrected, strict=True)]
    if any(number.gap.scope == "model" for number in numbers):
        notes.append(f"{ONE_SEED.strip()} One seed: these models only, so there is no p.")
    if len(pairs) < len(ours):
        unmatched = text.count(len(ours) - len(pairs), "group")
        notes.append(f"{unmatched} of {a} without a counterpart in {b}.")
    knobs = _knobs(_agreed(ours), _agreed(theirs))
    return Comparison(str(a), str(b), knobs, tuple(numbers), tuple(notes))


def _agreed(groups: Sequence[Group]) -> dict[str, Any]:
    """The settings that all groups of a run share."""
    first, *others = [group.settings for group in groups if group.settings] or [{}]
    return {key: value for key, value in first.items() if all(s.get(key) == value for s in others)}


# -------------------------------------------------------------------------------------- shared


def _side_by_side(a: Group, b: Group, where: str) -> Iterator[Difference]:
    for metric in a.stats:
        ours, theirs, gap = a.get(metric), b.get(metric), difference(a, b, metric)
        if ours and theirs and gap:
            yield Difference(where, ours, theirs, gap, pairs=gap.n)


def _knobs(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Knob, ...]:
    """The settings that differ. If both have a component and one does not name a knob of it, that
    knob is at its default."""
    knobs = []
    for key in dict.fromkeys([*a, *b]):
        component = f"{key.partition('.')[0]}.name"
        absent = "default" if a.get(component) == b.get(component) else "–"
        sides = [text.knob(side[key]) if key in side else absent for side in (a, b)]
        if sides[0] != sides[1]:
            knobs.append(Knob(text.line(key), *sides))
    return tuple(knobs)


def _templates(a: CellResult, b: CellResult, force: bool) -> list[str]:
    """A note if the templates differ: such numbers answer different questions."""
    first, second = (text.line(side.template or "unknown") for side in (a, b))
    if first == second:
        return []
    note = f"Different templates rendered the prompts ({first}, {second}): these are two tasks."
    if not force:
        raise UserError(f"{note} Use --force to compare them anyway.")
    return [note]
