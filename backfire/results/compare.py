"""Two cells or two runs beside each other: which knobs differ, which numbers, and how surely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire import text
from backfire.errors import UserError
from backfire.evaluate.seeds import holm
from backfire.result import CellResult
from backfire.results.groups import ALONE, Gap, Group, Stat, difference, group, name, varying
from backfire.results.load import cell, load
from backfire.results.pairs import pair, version_notes

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Knob:
    """A setting that differs; a dotted key as in a recipe."""

    key: str
    a: str
    b: str


@dataclass(frozen=True)
class Difference:
    """One metric of both sides, and b - a. `pairs` is there where both answered the same prompts
    and were compared on them one by one; `p`, corrected for all lines (Holm 1979), where both sides
    have several seeds."""

    where: str
    a: Stat
    b: Stat
    gap: Gap
    p: float | None = None
    pairs: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    a: str
    b: str
    knobs: tuple[Knob, ...]
    numbers: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(a: Path, b: Path, *, force: bool = False) -> Comparison:
    """Two cell folders, prompt by prompt where they answered the same ones; or two run folders,
    group by group.

    Raises:
        UserError: they are not two of a kind, or have no numbers, or were rendered by different
            templates (unless `force`).
    """
    if _is_run(a) != _is_run(b):
        raise UserError("One is a run and the other a cell; compare two of a kind.")
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
        rows = [[where, *row] for where, own in tables.items() for row in own]
        put(["group", *header], rows, console, right=range(2, 6))
        tables = {}
    for where, own in tables.items():
        if where:
            console.print()
            say(where, console)
        put(header, own, console, right=range(1, 5))
    for line in lines:
        say(line, console)


def _line(item: Difference) -> list[str]:
    return [item.a.title, item.a.shown, item.b.shown, item.gap.said, text.chance(item.p)]


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
    paired, said = pair(first, second)
    numbers = []
    said += version_notes([first], [second], paired)
    for item in _side_by_side(group([first])[0], group([second])[0], ""):
        # A part (one language, say) has no paired test of its own.
        is_whole = item.a.role == "headline" and not item.a.part
        test = paired.get(item.a.family) if is_whole else None
        if test:
            ends = (test.difference, test.low, test.high)
            gap = Gap(item.a.unit, *ends, n=test.n, scope=item.gap.scope)
            item = replace(item, gap=gap, pairs=test.n)
        numbers.append(item)
    if any(item.gap.scope == "model" for item in numbers):
        said.append(f"{ALONE.strip()} One seed each: of these two models only, and so without a p.")
    return Comparison(
        a=first.slug,
        b=second.slug,
        knobs=_knobs(first.settings, second.settings),
        numbers=tuple(numbers),
        notes=(*notes, *said),
    )


# ------------------------------------------------------------------------------------ two runs


def _runs(a: Path, b: Path, force: bool) -> Comparison:
    """Groups that the same knobs name stand beside each other."""
    first, second = load(a), load(b)
    notes = _templates(first[0], second[0], force)
    ours, theirs = group(first), group(second)
    # What names a group is what differs within a run: a knob that differs throughout stands above.
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
        notes.append(f"{ALONE.strip()} One seed: of these models only, and so without a p.")
    if len(pairs) < len(ours):
        alone = text.count(len(ours) - len(pairs), "group")
        notes.append(f"{alone} of {a} without a counterpart in {b}.")
    knobs = _knobs(_agreed(ours), _agreed(theirs))
    return Comparison(str(a), str(b), knobs, tuple(numbers), tuple(notes))


def _agreed(groups: Sequence[Group]) -> dict[str, Any]:
    """The settings that all groups of a run share."""
    known = [group.settings for group in groups if group.settings]
    first = known[0] if known else {}
    return {key: value for key, value in first.items() if all(s.get(key) == value for s in known)}


# -------------------------------------------------------------------------------------- shared


def _side_by_side(a: Group, b: Group, where: str) -> Iterator[Difference]:
    for metric in a.stats:
        ours, theirs, gap = a.get(metric), b.get(metric), difference(a, b, metric)
        if ours and theirs and gap:
            yield Difference(where, ours, theirs, gap, pairs=gap.n)


def _knobs(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Knob, ...]:
    """The settings that differ. A knob of a component that both have but one leaves out is at its
    default there."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        component = f"{key.partition('.')[0]}.name"
        absent = "default" if a.get(component) == b.get(component) else "–"
        sides = [text.knob(side[key]) if key in side else absent for side in (a, b)]
        if sides[0] != sides[1]:
            found.append(Knob(text.line(key), *sides))
    return tuple(found)


def _templates(a: CellResult, b: CellResult, force: bool) -> list[str]:
    """Numbers of two templates are of two different questions; the field's costliest slip."""
    first, second = (text.line(side.template or "unknown") for side in (a, b))
    if first == second:
        return []
    if not force:
        raise UserError(
            f"Different templates rendered the prompts ({first}, {second}): these are two tasks. "
            "Use --force to compare them anyway."
        )
    return [f"Different templates rendered the prompts ({first}, {second}): these are two tasks."]
