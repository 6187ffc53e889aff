"""Text in a terminal: tables and lines that fit its width; whole plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from backfire import text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def put(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console | None = None,
    right: Sequence[int] = (),
) -> None:
    """Print a table: ruled in a terminal, plain lines elsewhere; `right` columns are right-aligned.

    In a terminal that is too narrow, values that all rows share are printed above the table, long
    names wrap in their column, and further numbers get further tables of the same rows. Where the
    names leave too little room, they get a separate table, and a number identifies each row.
    """
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.file.write(columns(header, rows))
        return
    names = [i for i in range(len(header)) if i not in right]
    numbers = [i for i in range(len(header)) if i in right]
    table = [[text.line(cell) for cell in row] for row in (header, *rows)]
    widths = [_width(column, splits=False) for column in zip(*table, strict=True)]
    if sum(widths) + _GAP * (len(widths) - 1) > console.width:
        table[1:] = [[_lines(cell, i in right) for i, cell in enumerate(row)] for row in rows]
        widths = [_width(column) for column in zip(*table, strict=True)]
        names = _shared_above(table, names, console) if numbers else names
        numbers = [i for i in numbers if any(row[i] not in ("", "–") for row in table[1:])]
    shown = [[*names, *block] for block in _blocks(names, numbers, widths, console.width)]
    mark = len(header)  # a column with the number of the row
    table = [[*row, str(i) if i else "#"] for i, row in enumerate(table)]
    widths.append(len(table[-1][mark]))
    apart = _blocks([mark], numbers, widths, console.width)
    if names and len(apart) + 1 < len(shown):
        shown = [[mark, *names], *([mark, *block] for block in apart)]
    for chosen in filter(None, shown):
        console.print()
        console.print(_ruled(table, chosen, widths, [*right, mark]))


_GAP = 3  # between the columns of a ruled table
_NARROW = 16  # names longer than this may wrap


def _lines(cell: str, is_number: bool) -> str:
    """The cleaned cell; a number may have a second line."""
    parts = cell.split("\n") if is_number else [cell]
    return "\n".join(map(text.line, parts))


def _width(column: Sequence[str], splits: bool = True) -> int:
    """Terminal cells that a column takes; its header may wrap at blanks."""
    header, *cells = column
    heads = header.split() if splits else [header]
    return max(map(width_of, [*heads, *(part for c in cells for part in c.split("\n"))]))


def _shared_above(
    table: Sequence[Sequence[str]], names: Sequence[int], console: Console
) -> list[int]:
    """Print what is the same in all rows; returns the columns that are left."""
    shared = [i for i in names if len({row[i] for row in table[1:]}) == 1]
    if shared:
        console.print()
        say(", ".join(f"{table[0][i]} {table[1][i]}" for i in shared), console)
    return [i for i in names if i not in shared]


def _blocks(
    names: Sequence[int], numbers: Sequence[int], widths: Sequence[int], width: int
) -> list[list[int]]:
    """The columns of numbers in as few tables as the width allows; each repeats the names."""
    room = width - sum(min(widths[i], _NARROW) + _GAP for i in names)
    blocks: list[list[int]] = [[]]
    for i in numbers:
        taken = sum(widths[j] + _GAP for j in blocks[-1])
        if blocks[-1] and taken + widths[i] > room:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _ruled(
    table: Sequence[Sequence[str]],
    chosen: Sequence[int],
    widths: Sequence[int],
    right: Collection[int],
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ruled = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for i in chosen:
        if i in right:
            ruled.add_column(Text(table[0][i]), justify="right", width=widths[i])
        else:
            ruled.add_column(Text(table[0][i]), overflow="fold")
    for row in table[1:]:
        # Text, not str: brackets from a file are no markup.
        ruled.add_row(*(Text(row[i]) for i in chosen))
    return ruled


def say(line: str, console: Console | None = None, lead: str | Text = "") -> None:
    """Print a line after its `lead`: in a terminal it wraps at words, elsewhere it stays whole."""
    from rich.console import Console
    from rich.text import Text

    console, plain = console or Console(), text.line(line)
    lead = lead if isinstance(lead, Text) else Text(lead)
    if not console.is_terminal:
        console.file.write(f"{lead.plain}{plain}\n")
        return
    room = max(20, console.width - lead.cell_len)
    for part in Text(plain).wrap(console, room) or [Text()]:
        console.print(lead + part, soft_wrap=True)
        lead = Text(" " * lead.cell_len)


def fitted(line: str, console: Console) -> str:
    """The line, cut to the width of a terminal with an ellipsis; whole elsewhere."""
    from rich.text import Text

    shown = Text(line)
    if console.is_terminal:
        shown.truncate(console.width, overflow="ellipsis")
    return shown.plain


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain lines, two spaces between columns, nothing cut."""
    table = [[text.line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(width_of, column)) for column in zip(*table, strict=True)]
    pairs = (zip(row, widths, strict=True) for row in table)
    lines = ("  ".join(c + " " * (width - width_of(c)) for c, width in row) for row in pairs)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def width_of(plain: str) -> int:
    """Terminal cells of a text: two for each Chinese, Japanese or Korean character."""
    from rich.cells import cell_len

    return cell_len(plain)
