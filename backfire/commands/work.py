"""`backfire work`: do jobs of a plan, beside any number of other workers on any hosts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from backfire import text
from backfire.claims import Claims
from backfire.commands import host
from backfire.commands.estimate import amount
from backfire.commands.failure import note
from backfire.commands.plan import memory_of
from backfire.commands.run import on_device, settings_of, stopping
from backfire.commands.workers import SMALL, default_workers, on_devices
from backfire.data.weights import listed
from backfire.errors import GpuError, UserError
from backfire.experiment import Machine
from backfire.launch import local
from backfire.launch.folder import Plan, read_plan
from backfire.launch.job import RunFolder
from backfire.launch.order import fits, needed
from backfire.launch.progress import ProgressDisplay
from backfire.launch.resolve import types_of
from backfire.launch.stop import Stop
from backfire.launch.users import has_finished, still_uses
from backfire.model.types import Types, types_here
from backfire.plan import Job
from backfire.store import Store
from backfire.terminal import say
from backfire.train import devices


def start(
    run: Path,
    machine: Mapping[str, Any],
    *,
    minutes: float | None = None,
    memory: float | None = None,
) -> int:
    """Work on a run until nothing is left that this machine can do, the minutes are over, or a
    signal comes; returns the number of cells that failed here. After a signal that is 0: the job of
    a scheduler then goes on later, and its exit code says nothing about the cells.

    Args:
        memory: bytes that a job may need; by default what the machine has, divided among its
            workers.

    Raises:
        UserError: the folder has no plan for this machine, which lacks something, or no job fits.
    """
    plan = read_plan(run)
    with host.where_planned(run, plan) as place:
        return _start(place, plan, machine, minutes, memory)


def _start(
    run: Path,
    plan: Plan,
    machine: Mapping[str, Any],
    minutes: float | None,
    memory: float | None,
) -> int:
    console, stop = Console(stderr=True), Stop(minutes)
    plan = replace(plan, jobs=on_devices(plan.jobs, settings_of(machine).devices))
    settings, most = _sized(run, plan, machine, memory)
    folder, begun = RunFolder(run, plan.recipe), set[str]()
    left = needed(plan.jobs, folder)
    _check_memory(left, most)
    host.check(run, plan, left)
    still_uses(run, plan.text, plan.jobs)
    with ProgressDisplay(console, plan.jobs) as display, stop.on_signals(stopping(console)):
        try:
            ended = local.run(
                plan.jobs,
                folder,
                Store(),
                settings,
                display.watch,
                stop=stop,
                memory=most,
                stays=False,
                begins=lambda job: begun.add(job.id),
            )
        except GpuError as error:  # not bad input: on another machine it may succeed
            note(str(error))
            return 1
    if stop.interrupted and len(ended) < len(plan.jobs):
        raise KeyboardInterrupt
    failed = _failed(plan, begun, ended)
    _say_what_is_left(run, plan, ended, failed, most, stop, console)
    return 0 if stop.signaled else len(failed)


def _sized(
    run: Path, plan: Plan, machine: Mapping[str, Any], memory: float | None
) -> tuple[Machine, float]:
    """The settings of this machine, and the bytes that a job may need.

    Raises:
        UserError: this machine cannot work on the run.
    """
    settings = settings_of(machine)
    devices.check(settings)
    devices.check_cells((job.experiment for job in plan.jobs), settings)
    types = types_of(settings.device)
    _check_device(run, plan, types)
    settings = on_device(settings, types)
    ranks = settings.devices if types.device == "cpu" else 1  # which share the memory
    has = memory_of(settings.device, types) / ranks
    if (
        "workers" not in machine and not devices.launched()
    ):  # so many that each has memory for any job that fits at all
        cells = sum(job.kind == "cell" for job in plan.jobs)
        need = min(has, max((job.memory or 0.0 for job in plan.jobs), default=0.0) or SMALL)
        workers = default_workers(cells, settings, need=need)
        settings = settings.model_copy(update={"workers": workers})
    each = has / (settings.workers if types.device == "cpu" else 1)
    return settings, each if memory is None else memory / ranks


def _failed(plan: Plan, begun: Collection[str], ended: Mapping[str, str]) -> list[Job]:
    """The failed cells that this command began itself, or a stage of which failed here. (A cell
    that lacks another worker's stage is that worker's.)"""
    bad = {name for name, kind in ended.items() if kind != "ok"}
    here = bad.intersection(begun)
    cells = [job for job in plan.jobs if job.kind == "cell" and job.id in bad]
    return [job for job in cells if job.id in here or here.intersection(job.after)]


_NAMES = {"cpu": "CPU", "cuda": "GPU"}


def _check_device(run: Path, plan: Plan, types: Types) -> None:
    """Refuse a device on which the jobs would give other results than planned."""
    if types.device != plan.device:
        raise UserError(
            f"{run} is planned for a {_NAMES[plan.device]}, and this worker would run on a "
            f"{_NAMES[types.device]}; choose it by --device, or plan again with --device "
            f"{types.device}."
        )
    embedded = any(job.experiment.model.name == "sandbox" for job in plan.jobs)
    if embedded and plan.compute != types_here().compute:
        raise UserError(
            f"{run} is planned for machines on which the embedded base computes in {plan.compute}, "
            f"and this one computes in {types_here().compute}; plan again on a machine like this."
        )


def _say_what_is_left(
    run: Path,
    plan: Plan,
    ended: Mapping[str, str],
    failed: Sequence[Job],
    memory: float,
    stop: Stop,
    console: Console,
) -> None:
    cells = [job for job in plan.jobs if job.kind == "cell"]
    bad = [job for job in cells if ended.get(job.id, "ok") != "ok"]
    left = [job for job in plan.jobs if job.id not in ended]
    say(f"{text.count(len(cells), 'cell')}: {_counts(cells, ended)}.", console)
    if failed:
        names = listed([job.title for job in failed])
        say(f"Failed here: {names}; `backfire status {run}` says why.", console)
    elif bad:
        say(f"`backfire status {run}` says why cells failed.", console)
    if not left:
        if not bad:
            has_finished(run)
        say(f"Nothing is left to do. Report: backfire report {run}", console)
    elif stop.signaled:
        say("Stopped by a signal; the next `backfire work` goes on.", console)
    elif stop:
        say("The time is over; the next `backfire work` goes on.", console)
    else:
        held, fit = Claims(run).names(), fits(stop, memory)
        free = [job for job in left if job.id not in held]
        if large := [job for job in free if (job.memory or 0) > memory]:
            say(_too_large(large, memory), console)
        elif not all(map(fit, free)):
            rest = "What is left takes longer, by its estimate, than the time that is left here"
            say(f"{rest}; the next `backfire work` goes on.", console)
        else:
            say(f"Other workers have what is left; `backfire status {run}` shows them.", console)


def _counts(cells: Sequence[Job], ended: Mapping[str, str]) -> str:
    done = sum(ended.get(job.id) == "ok" for job in cells)
    left = sum(job.id not in ended for job in cells)
    return f"{done} done, {len(cells) - done - left} failed, {left} left"


def _check_memory(left: Sequence[Job], memory: float) -> None:
    """Refuse to work where no job fits."""
    known = [job for job in left if job.memory is not None]
    if known and all((job.memory or 0) > memory for job in known):
        raise UserError(_too_large(known, memory))


def _too_large(jobs: Sequence[Job], memory: float) -> str:
    least = amount(min(job.memory or 0 for job in jobs))
    return (
        f"{text.count(len(jobs), 'job')} left that need {least} of memory or more, and a worker "
        f"has {amount(memory)} here; use fewer --workers or a larger machine."
    )
