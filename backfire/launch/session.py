"""`backfire run`: check first, then work, then show."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from backfire import plan
from backfire.experiment import Machine
from backfire.launch import check
from backfire.launch.run import open_folder
from backfire.launch.settle import pinned, settled, types_of
from backfire.plan import Job
from backfire.recipe import Recipe
from backfire.store import Store


def start(
    recipe: Recipe,
    out: Path,
    machine: Mapping[str, Any],
    *,
    profile: str | None,
    edits: Sequence[str],
) -> int:
    """Run a recipe into `out`, print its table, write its page; returns how many cells failed.

    Raises:
        UserError, CellError: the recipe or its data are not fit to run; nothing was started.
    """
    store, console = Store(), Console(stderr=True)
    settings = Machine.make({"workers": default_workers(len(recipe.cells)), **machine}, "option")
    # A device that is not there is said once here, not by every cell.
    recipe = settled(pinned(recipe), types_of(settings.device))
    work = plan.jobs(recipe.cells, recipe.axes)
    if not all(
        (out / "cells" / f"{c.slug}-{c.key}" / "result.json").is_file() for c in recipe.cells
    ):
        with console.status("Looking at the data"):
            check.preflight_all(recipe, store)
        folder = open_folder(out, recipe, profile, edits)
        from backfire.launch.local import run

        with Board(console, len(recipe.cells)) as board:
            ended = run(work, folder, store, settings, board.watch)
    else:
        open_folder(out, recipe, profile, edits)
        console.print(f"All {len(recipe.cells)} cells are done already.")
        ended = {}
    return _finish(out, ended, work, console)


def default_workers(num_cells: int) -> int:
    """One single-threaded worker a core on CPU; one on a GPU."""
    from importlib.util import find_spec

    from backfire.model.types import has_gpu

    if find_spec("torch") and has_gpu():
        return 1
    return max(1, min(num_cells, os.cpu_count() or 1))


def _finish(out: Path, ended: Mapping[str, str], work: Sequence[Job], console: Console) -> int:
    from backfire.report.page import write_report
    from backfire.report.records import summary
    from backfire.report.table import print_against, print_ranking, print_summary

    bad = [job for job in work if job.kind == "cell" and ended.get(job.id, "ok") != "ok"]
    page = write_report(out)
    groups = summary(out)
    print_summary(groups, Console())
    print_ranking(groups, Console())
    print_against(groups, Console())
    for job in bad:
        console.print(
            f"[red]{job.cell.slug}: {ended[job.id]}[/red] "
            f"(see {out}/cells/{job.cell.slug}-{job.key}/error.json)"
        )
    console.print(f"Report: {page}", soft_wrap=True)
    return len(bad)


class Board:
    """A line per running job on a terminal; a line per finished one elsewhere."""

    def __init__(self, console: Console, num_cells: int) -> None:
        self.console, self.live = console, sys.stderr.isatty()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self.live,
            transient=True,
        )
        self.total = self.progress.add_task("cells", total=num_cells, text="")
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Board:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def watch(self, job: Job, text: str, done: int, total: int) -> None:
        """Show how far a job is; an exit class as `text` ends it."""
        task = self.tasks.get(job.id)
        if task is None:
            task = self.tasks[job.id] = self.progress.add_task(
                f"{job.kind} {job.title}", total=total, text=text
            )
        self.progress.update(task, completed=done, total=total, text=text)
        if text in _ENDS:
            self.progress.remove_task(self.tasks.pop(job.id))
            if job.kind == "cell":
                self.progress.advance(self.total)
            if not self.live:
                self.console.print(
                    f"{job.kind} {job.title}: {text}", soft_wrap=True, highlight=False
                )


_ENDS = {"ok", "failed", "nan", "oom", "bad-data", "killed", "timeout", "disk-full", "interrupted"}
