"""Results in a terminal: tables for people, plain lines for pipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import starmap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from backfire import text
from backfire.result import CellResult
from backfire.results.groups import Group, Stat
from backfire.results.tables import numbers
from backfire.terminal import columns, fitted, put, say, width_of

if TYPE_CHECKING:
    from rich.console import Console

    from backfire.results.load import Record


def print_summary(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the summary of a run: a line per group, a column per headline metric."""
    from rich.console import Console

    console = console or Console()
    for place, table in enumerate(numbers(groups)):
        if place:
            _apart(console)
        rows = [[*knobs, *starmap(_number, stats), seeds] for knobs, stats, seeds in table.rows]
        header = [*table.knobs, *table.metrics, "seeds"]
        put(header, rows, console, right=range(len(table.knobs), len(header)))


def _apart(console: Console) -> None:
    """An empty line before another table, whose rules a pipe lacks."""
    if not console.is_terminal:
        console.print()


def print_groups(groups: Sequence[Group]) -> None:
    """Print all that is known of the groups: their numbers, rankings, tests and notes."""
    print_summary(groups)
    print_ranking(groups)
    print_against(groups)
    print_notes(groups)


def print_notes(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the notes on the intervals, one per line."""
    from rich.console import Console

    from backfire.results.intervals import notes

    console = console or Console()
    if console.is_terminal:
        console.print()
    for note in notes(groups):
        say(note, console)


def print_against(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the paired tests against the reference, if there are any."""
    from rich.console import Console

    from backfire.results.paired_tests import table

    tests, console = table(groups), console or Console()
    if tests.rows:
        _apart(console)
        put(tests.header, tests.rows, console, right=range(3, 8))


def print_ranking(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the ranking of the defenses, if there are any."""
    from rich.console import Console

    from backfire.results.ranking import table

    console = console or Console()
    if ranking := table(groups):
        _apart(console)
        words = ("defense", "worst setting")
        right = [place for place, name in enumerate(ranking.header) if name not in words]
        put(ranking.header, ranking.rows, console, right=right)


def print_problems(cells: Sequence[CellResult], console: Console) -> None:
    """Print each reason for missing numbers with its cells, and what to do next."""
    by_reason: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        if not cell.is_done:
            reason = text.line(cell.status), text.line(cell.error), text.line(cell.next)
            by_reason.setdefault(reason, []).append(text.line(Path(cell.folder).name))
    for (status, error, hint), names in sorted(by_reason.items(), key=lambda item: item[0][0]):
        why = error or "Run the same command again to continue."
        say(f"{status}, {text.count(len(names), 'cell')}: {why}", console)
        if hint:
            say(f"Next: {hint}", console, lead="  ")
        most = _FEW if console.is_terminal else len(names)
        rest = [f"and {len(names) - most} more"] if len(names) > most else []
        for name in [*names[:most], *rest]:
            console.file.write(f"{fitted(f'  {name}', console)}\n")


_FEW = 10  # cells per reason that a terminal shows
_MOST_WARNINGS = 5


def print_warnings(cells: Sequence[CellResult], console: Console) -> None:
    """Print the first warnings of the cells, each once; the report has all of them."""
    from backfire.results.load import distinct_warnings

    warnings = distinct_warnings(cells)
    for sentence, where in warnings[:_MOST_WARNINGS]:
        say(f"Note on {where}: {sentence}", console)
    if (more := len(warnings) - _MOST_WARNINGS) > 0:
        say(f"{text.count(more, 'more note')}: see the report.", console)


def print_records(
    records: Sequence[Record],
    console: Console | None = None,
    *,
    titles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print the numbers of a run, one per line; in a narrow terminal grouped by cell, without the
    columns that identify it. `titles` are names of cells that tell more, by key."""
    from rich.console import Console

    from backfire.results.load import brief, write

    records = [{**record, "cell": titles.get(record["key"], record["cell"])} for record in records]
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
    say("The settings of each cell and the direction of each metric: --format csv.", console)


def _number(stat: Stat | None, floor: Stat | None) -> str:
    if stat is None:
        return "–"
    return f"{stat.shown}\n(baseline {floor.number()})" if floor else stat.shown
