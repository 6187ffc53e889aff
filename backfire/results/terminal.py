"""The summary in a terminal: a table for people, plain lines for pipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backfire import text
from backfire.results.groups import Group, Stat, columns_of, families, headlines

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print the summary of a run: a line per group, a column per headline metric."""
    from rich.console import Console

    console = console or Console()
    columns = columns_of(groups)
    for number, family in enumerate(families(groups)):
        if number:
            console.print()
        _print_family(family, columns[id(family[0])], console)


def print_notes(groups: Sequence[Group], console: Console | None = None) -> None:
    """Print what has to be known of the intervals, a sentence a line."""
    from rich.console import Console

    from backfire.results.intervals import notes

    for note in notes(groups):
        (console or Console()).print(note, markup=False, highlight=False, soft_wrap=True)


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
        put(found["header"], rows, console, right=range(1, len(found["header"])))


def put(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console | None = None,
    right: Sequence[int] = (),
) -> None:
    """Print a table: ruled and fitted to the window in a terminal, plain lines elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    if not console.is_terminal:
        console.file.write(columns(header, rows))
        return
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(Text(text.line(name)), justify="right" if index in right else "left")
    for row in rows:
        # Text, not str: brackets from a file are no markup.
        table.add_row(*(Text(text.line(cell)) for cell in row))
    console.print(table)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain lines, two spaces between columns, nothing cut."""
    table = [[text.line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pairs = (zip(row, widths, strict=True) for row in table)
    lines = ("  ".join(cell.ljust(width) for cell, width in row) for row in pairs)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _number(stat: Stat | None, floor: Stat | None) -> str:
    if stat is None:
        return "–"
    return f"{stat.shown} (floor {floor.number()})" if floor else stat.shown
