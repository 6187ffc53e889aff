"""`backfire status`: which cells of a run are done, failed or missing, and who works on what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from backfire import text
from backfire.claims import BEAT, STALE, Claims
from backfire.results.load import left_out, load
from backfire.results.terminal import print_problems
from backfire.terminal import say


def show(run: Path) -> None:
    """Print a count for each state, who works on what, and what to do about the cells that have no
    numbers.

    Raises:
        UserError: there are no cells.
    """
    console, cells = Console(), load(run)
    counts = Counter(text.line(cell.status) for cell in cells)
    for status in sorted(counts, key=lambda name: (name != "ok", name == "unfinished", name)):
        say(f"{status}: {counts[status]}", console)
    if others := left_out(run):
        say(f"Not in the recipe any more: {text.count(others, 'cell')}", console)
    for line in _claims(run):
        say(line, console)
    print_problems(cells, console)


def _claims(run: Path) -> Iterator[str]:
    """A line for each job that a worker has."""
    for one in Claims(run).holders():
        share = f", {one.done / max(one.total, 1):.0%}" if one.total > 1 else ""
        doing = text.cut(text.line(f"{one.title}: {one.activity or 'starting'}{share}"), 120)
        where = text.cut(text.line(f"{one.host} (process {one.pid})"), 80)
        silent = f"no sign of life for {text.duration(one.age)}"
        if one.is_stale:
            yield f"stale: {doing}, on {where}; {silent}, and the next worker goes on"
        elif one.age > 2 * BEAT:
            after = text.duration(STALE)
            yield f"silent: {doing}, on {where}; {silent}, and after {after} another worker goes on"
        else:
            yield f"running: {doing}, on {where}, last sign of life {one.age:.0f} s ago"
