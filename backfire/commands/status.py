"""`backfire status`: which cells of a run are done, which failed and why, which are missing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from backfire import text
from backfire.results.load import left_out, load
from backfire.results.terminal import print_problems
from backfire.terminal import say


def show(run: Path) -> None:
    """Print a count for each state, and what to do about the cells that have no numbers.

    Raises:
        UserError: there are no cells.
    """
    console, cells = Console(), load(run)
    counts = Counter(text.line(cell.status) for cell in cells)
    for status in sorted(counts, key=lambda name: (name != "ok", name == "unfinished", name)):
        say(f"{status}: {counts[status]}", console)
    if others := left_out(run):
        say(f"Not in the recipe any more: {text.count(others, 'finished cell')}", console)
    print_problems(cells, console)
