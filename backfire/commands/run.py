"""`backfire run`: validate, execute, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from backfire import plan, stages, text
from backfire.claims import Claims
from backfire.commands.plan import check, memory_of, with_estimates, with_minutes
from backfire.commands.workers import default_workers, largest, workers_by_device
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.launch.folder import check_writable, write_plan
from backfire.launch.imports import uncollected
from backfire.launch.job import RunFolder
from backfire.launch.progress import ProgressDisplay
from backfire.launch.resolve import pin_models, resolve_auto, types_of
from backfire.launch.users import has_finished
from backfire.model.types import Types
from backfire.plan import Job
from backfire.recipe import Recipe
from backfire.result import CellResult
from backfire.results.groups import group
from backfire.results.load import load
from backfire.store import Store
from backfire.terminal import say
from backfire.train import devices


def start(
    recipe: Recipe,
    out: Path,
    machine: Mapping[str, Any],
    *,
    profile: str | None,
    edits: Sequence[str],
) -> int:
    """Run a recipe into `out`, print its table, write its page; returns the number of failed cells.

    Raises:
        UserError, CellError: the recipe or its data are invalid; nothing was started.
    """
    check_writable(out)
    store, console = Store(), Console(stderr=True)
    settings = settings_of(machine)
    # A missing device is reported once here, and not by every cell.
    devices.check(settings)
    devices.check_cells(recipe.cells, settings)
    recipe = resolve_auto(pin_models(recipe), (types := types_of(settings.device)))
    settings = on_device(settings, types)
    work = plan.jobs(recipe.cells, recipe.axes)
    place = RunFolder(out, recipe.name)
    if not all(place.done(cell, stages.cell_key(cell)) for cell in recipe.cells):
        from backfire.launch import local

        is_set = "workers" in machine or bool(devices.launched())
        if (settings.workers if is_set else workers_by_device(len(recipe.cells), settings)) > 1:
            local.warm_up()
        with uncollected():  # the checks import torch
            check(recipe, store, console, memory_of(settings.device, types))
        if not is_set:
            need, title = largest(recipe, types, settings)
            workers = default_workers(len(recipe.cells), settings, need=need, title=title)
            settings = settings.model_copy(update={"workers": workers})
        work, memory = _estimated(work, recipe, store, types, settings)
        write_plan(out, recipe, work, device=types.device, profile=profile, edits=edits)
        if others := at_work(out):
            say(f"{others}; this command shares the jobs with them.", console)
        from backfire.launch.stop import Stop

        stop = Stop()
        with ProgressDisplay(console, work) as display, stop.on_signals(stopping(console)):
            options: dict[str, Any] = {"stop": stop, "memory": memory}
            ended = local.run(work, place, store, settings, display.watch, **options)
        if stop and len(ended) < len(work):
            raise KeyboardInterrupt
    else:
        write_plan(out, recipe, work, device=types.device, profile=profile, edits=edits)
        console.print(f"All {len(recipe.cells)} cells are already done.")
        ended = {}
    return finish(out, ended, work, console)


def _estimated(
    work: Sequence[Job], recipe: Recipe, store: Store, types: Types, settings: Machine
) -> tuple[list[Job], float | None]:
    """The jobs with their estimates; and the bytes that a worker has, where this decides how many
    runs it trains together. No job is too large by itself."""
    if settings.join != "auto" or settings.devices > 1:
        return with_minutes(work, store, types), None
    found = with_estimates(work, recipe, store, types)
    has = memory_of(settings.device, types) / (settings.workers if types.device == "cpu" else 1)
    return found, max([has, *(job.memory or 0.0 for job in found)])


def at_work(run: Path) -> str:
    """Who works on a run now; empty if nobody does."""
    alive = [one for one in Claims(run).holders() if not one.is_stale]
    hosts = [f"{one.host} (process {one.pid})" for one in alive]
    if not hosts:
        return ""
    some = text.listing([*hosts[:3], *([f"{len(hosts) - 3} more"] * (len(hosts) > 3))])
    return text.line(f"{text.count(len(hosts), 'worker')} at work on {run}: {some}")


def stopping(console: Console) -> Callable[[], None]:
    """Tells what Ctrl-C does."""
    sentence = "Stopping, with a checkpoint of what is at work; Ctrl-C again ends it at once."
    return lambda: say(sentence, console)


def settings_of(machine: Mapping[str, Any]) -> Machine:
    """The settings of the machine: these, and the number of devices that a launcher gives."""
    outside = devices.launched()
    return Machine.make({"devices": outside[1] if outside else 1, **machine}, "option")


def on_device(settings: Machine, types: Types) -> Machine:
    """The settings with the GPU that `auto` has found: should it be lost later, no job may go on
    silently on the CPU."""
    found = settings.device == "auto" and types.device == "cuda"
    return settings.model_copy(update={"device": "cuda"}) if found else settings


def finish(out: Path, ended: Mapping[str, str], work: Sequence[Job], console: Console) -> int:
    from backfire.report.page import write_report
    from backfire.results import terminal

    cells = load(out)
    page, groups = write_report(out, cells), group(cells)
    if all(cell.is_done for cell in cells):
        has_finished(out)
    terminal.print_groups(groups)
    terminal.print_warnings(cells, console)
    bad = [job for job in work if job.kind == "cell" and ended.get(job.id, "ok") != "ok"]
    if bad:
        terminal.print_problems(cells, console)
        say(f"Each has an error.json under {out}/cells.", console)
    if line := _shared([job.experiment for job in work if job.kind == "cell"]):
        say(line, console)
    if silent := _unmeasured(cells, work):
        say(f"No cell has a number for: {', '.join(silent)}.", console)
    say(f"All numbers: backfire results {out} --format csv", console)
    console.print(f"Report: {page}", soft_wrap=True)
    return len(bad)


def _shared(cells: Sequence[Experiment]) -> str:
    """What the cells shared; empty if nothing."""
    try:
        counts = plan.sharing(cells)
    except UserError:  # an input file is gone by now
        return ""
    parts = [
        f"{needed - distinct} of {needed} {what}"
        for what, (needed, distinct) in counts.items()
        if distinct < needed
    ]
    return f"Shared by cells, and so not repeated: {' and '.join(parts)}." if parts else ""


def _unmeasured(cells: Sequence[CellResult], work: Sequence[Job]) -> list[str]:
    """Requested metrics without a number in any cell."""
    done = [cell for cell in cells if cell.is_done]
    measured = {value.family for cell in done for value in cell.values}
    requested = {metric.name for job in work for metric in job.experiment.metrics}
    return sorted(requested - measured) if done else []
