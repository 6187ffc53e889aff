"""The summary in a terminal: a table for people, plain lines for pipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backfire import text
from backfire.result import CellResult
from backfire.results.groups import Group, Stat, columns_of, families, headlines
from backfire.terminal import columns, fitted, put, say, width_of

if TYPE_CHECKING:
    from rich.console import Console

    from backfire.results.load import Record


def print_summary(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the summary of a run: a line per group, a column per headline metric."""
    from rich.console import Console

    console = console or Console()
    columns = columns_of(groups)
    for number, family in enumerate(families(groups)):
        if number and not console.is_terminal:
            console.print()
        _print_family(family, columns[id(family[0])], console)


def print_notes(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print what has to be known of the intervals, a sentence a line."""
    from rich.console import Console

    from backfire.results.intervals import notes

    console = console or Console()
    found = notes(groups)
    if found and console.is_terminal:
        console.print()
    for note in found:
        say(note, console)


def _print_family(groups: Sequence[Group], knobs: Sequence[str], console: Console) -> None:
    metrics = headlines(groups)
    named = (text.line(knob).removeprefix("attack.") for knob in knobs)
    header = [*named, *map(text.title, metrics), "seeds"]
    rows = []
    for group in groups:
        floors = [group.side(metric, "floor") for metric in metrics]
        stats = [group.get(metric) for metric in metrics]
        numbers = [_number(stat, floor) for stat, floor in zip(stats, floors, strict=True)]
        rows.append([*(group.knob(knob) for knob in knobs), *numbers, group.seeds])
    put(header, rows, console, right=range(len(knobs), len(header)))


def print_against(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the paired tests against the reference, if there are any."""
    from backfire.results.paired_tests import lines

    if tests := lines(groups):
        header = ["group", "against", "metric", "difference", "95 % interval", "p (Holm)"]
        names = ("group", "reference", "metric", "difference", "interval", "p", "seeds", "pairs")
        lines_shown = [[line[name] for name in names] for line in tests]
        put([*header, "seeds", "pairs"], lines_shown, console, right=range(3, 8))


def print_ranking(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the defenses, ranked, if there are several."""
    from backfire.results.ranking import table

    if found := table(groups):
        rows = [found["plain"], *found["rows"]]
        words = ("defense", "worst setting")
        numbers = [i for i, name in enumerate(found["header"]) if name not in words]
        put(found["header"], rows, console, right=numbers)


def print_problems(cells: Sequence[CellResult], console: Console) -> None:
    """Print why cells failed, once for all that failed alike, what to do next, and which are not
    finished."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        if not cell.is_done:
            reason = text.line(cell.status), text.line(cell.error), text.line(cell.next)
            alike.setdefault(reason, []).append(text.line(Path(cell.folder).name))
    for (status, error, hint), names in sorted(alike.items(), key=lambda item: item[0][0]):
        known = error or "Run the same command again to go on."
        say(f"{status}, {text.count(len(names), 'cell')}: {known}", console)
        if hint:
            say(f"Next: {hint}", console, lead="  ")
        most = _FEW if console.is_terminal else len(names)
        rest = [f"and {len(names) - most} more"] if len(names) > most else []
        for name in [*names[:most], *rest]:
            console.file.write(f"{fitted(f'  {name}', console)}\n")


_FEW = 10  # cells of one kind that a terminal shows


def print_records(records: Sequence[Record], console: Console | None = None) -> None:
    """Print the numbers of a run, a line each; in a terminal too narrow for all columns, under
    their cells, without the columns that say what a cell is."""
    from rich.console import Console

    from backfire.results.load import brief, write

    console, whole = console or Console(), write(records, "table")
    if not console.is_terminal or max(map(width_of, whole.splitlines())) <= console.width:
        console.file.write(whole)
        return
    fields = ("metric", "value", "low", "high", "n")
    rows = [[brief(record[field]) for field in fields] for record in records]
    head, *lines = columns(fields, rows).splitlines()
    last = ""
    for record, line in zip(records, lines, strict=True):
        status = "" if record["status"] == "ok" else f" ({record['status']})"
        if (cell := text.line(f"{record['cell']}-{record['key']}{status}")) != last:
            console.file.write(f"{fitted(cell, console)}\n" + ("" if last else f"  {head}\n"))
            last = cell
        console.file.write(f"  {line}\n")
    say("The knobs of each cell and the direction of each metric: --format csv.", console)


def _number(stat: Stat | None, floor: Stat | None) -> str:
    if stat is None:
        return "–"
    return f"{stat.shown}\n(floor {floor.number()})" if floor else stat.shown
