"""`backfire run --on slurm` and `--on ray`: plan, start workers on a cluster, watch, report."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from backfire import plan, stages, text
from backfire.claims import Claims
from backfire.commands.estimate import amount
from backfire.commands.plan import check, types_for, with_estimates
from backfire.commands.run import finish
from backfire.commands.workers import on_devices
from backfire.errors import Interrupted, UserError
from backfire.launch import ray, slurm
from backfire.launch.folder import check_writable, write_plan
from backfire.launch.job import RunFolder
from backfire.launch.progress import ProgressDisplay
from backfire.launch.remote import Probe, probe, probe_of_run
from backfire.launch.resolve import pin_models, resolve_auto
from backfire.launch.stop import Stop
from backfire.launch.watch import Launcher, View, follow
from backfire.plan import Job
from backfire.recipe import Recipe
from backfire.registry import loaded
from backfire.store import Store
from backfire.terminal import say

_JOBS = 8  # most workers, if their number is not given
_SPARE = 1.2, 0.5e9
"""Factor and bytes by which a worker asks for more memory than is estimated."""
_MARGIN = 2
"""Time of a Slurm job in that of its longest training or evaluation by the estimate, which does not
know the speed of the nodes."""
_SHORTEST, _LONGEST = 60, 1440  # minutes of a Slurm job, if they are not given


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a cluster; None leaves it to the estimate or the cluster."""

    on: str
    jobs: int | None = None
    cpus_per_task: int | None = None
    gpus: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: Sequence[str] = ()
    ray_address: str | None = None
    open_cluster: bool = False

    @property
    def cluster_address(self) -> str | None:
        return self.ray_address or os.environ.get("RAY_ADDRESS") or None

    def refuse_strays(self) -> None:
        """Refuse options of another place.

        Raises:
            UserError: there is one.
        """
        shared = ("jobs", "cpus_per_task", "gpus", "mem")
        own: dict[str, tuple[str, ...]] = {
            "slurm": ("time", "partition", "account", "qos", "sbatch"),
            "ray": ("ray_address", "open_cluster"),
        }
        for place, names in own.items():
            for name in names:
                if getattr(self, name) and self.on != place:
                    raise UserError(f"--{name.replace('_', '-')} is for --on {place}.")
        if self.on == "local" and (given := [n for n in shared if getattr(self, n) is not None]):
            raise UserError(f"--{given[0].replace('_', '-')} is for --on slurm and --on ray.")

    def others(self) -> dict[str, str | bool]:
        """The other options of sbatch, without dashes; True for one without a value.

        Raises:
            UserError: one has no name.
        """
        pairs = [item.lstrip("-").partition("=") for item in self.sbatch]
        if not all(name for name, _, _ in pairs):
            raise UserError("--sbatch takes an option of sbatch, such as constraint=a100.")
        return {name: value if sign else True for name, sign, value in pairs}


def start(
    recipe: Recipe,
    out: Path,
    asked: Asked,
    machine: Mapping[str, Any],
    *,
    profile: str | None,
    edits: Sequence[str],
) -> int:
    """Run a recipe into `out` on a cluster, print its table, write its page; returns the number of
    failed cells.

    Raises:
        UserError, CellError: the recipe or its data are invalid, or the cluster refuses; nothing
            was started.
    """
    if asked.on == "slurm":
        slurm.available()
    else:
        ray.available(asked.cluster_address, asked.open_cluster)
    launcher_of = _slurm if asked.on == "slurm" else _ray
    device = "cuda" if asked.gpus and machine["device"] == "auto" else str(machine["device"])
    check_writable(out)
    store, console, types = Store(), Console(stderr=True), types_for(device)
    recipe = resolve_auto(pin_models(recipe), types)
    place, cells = RunFolder(out, recipe.name), recipe.cells
    jobs = plan.jobs(cells, recipe.axes)
    again: dict[str, Any] = {"device": types.device, "profile": profile, "edits": edits}
    if all(place.done(cell, stages.cell_key(cell)) for cell in cells):
        write_plan(out, recipe, jobs, **again)
        console.print(f"All {len(cells)} cells are already done.")
        return finish(out, {}, jobs, console)
    check(recipe, store, console)
    jobs, devices = with_estimates(jobs, recipe, store, types), machine.get("devices") or 1
    processes = machine.get("workers") or max(1, (asked.gpus or 0) // devices)
    memory = _memory(asked, on_devices(jobs, devices), processes * devices)
    launcher = launcher_of(out, asked, jobs, memory)
    launcher.check()
    if asked.on == "slurm" and not asked.time:
        say(_about_time(jobs), console)
    shared = probe()
    with console.status("Looking whether the machines share the folders"):
        _refuse_unshared(launcher, out, shared)
    write_plan(out, recipe, jobs, **again)
    each = memory / processes if types.device == "cpu" else None
    launcher.begin(_options(machine, types.device, processes, each), shared)
    count = asked.jobs or min(_JOBS, len(cells))
    return finish(out, _follow(launcher, place, jobs, count, console), jobs, console)


def _refuse_unshared(launcher: Launcher, out: Path, shared: Probe) -> None:
    """Refuse a run folder or a cache that a machine of the cluster does not see.

    Raises:
        UserError: there is such a machine.
    """
    with probe_of_run(out) as of_run:
        found = launcher.unread((of_run, shared))
    if found:
        host, lacking = found
        raise UserError(lacking.refused_by(host))


def _follow(
    launcher: Launcher,
    place: RunFolder,
    jobs: Sequence[Job],
    count: int,
    console: Console,
) -> dict[str, str]:
    """Keep workers on the cluster until all jobs have ended; returns how they ended."""
    stop, tell = Stop(), partial(say, console=console)
    with ProgressDisplay(console, jobs) as display, stop.on_signals():
        view = View(jobs, place, Claims(place.path), display.watch)
        try:
            follow(view, launcher, count, tell, stop)
        except KeyboardInterrupt:
            stop.signaled = True
        except UserError:
            launcher.cancel(tell)
            raise
    if stop:
        raise Interrupted(f"Interrupted. {launcher.goes_on(tell)}")
    launcher.cancel(tell)  # those that wait in the queue have nothing left to do
    return view.ended


def _slurm(out: Path, asked: Asked, jobs: Sequence[Job], memory: float) -> slurm.Slurm:
    request = slurm.Request(
        minutes=slurm.minutes_of(asked.time) if asked.time else _minutes(jobs),
        memory=round(memory),
        cpus=asked.cpus_per_task or 1,
        gpus=asked.gpus or 0,
        partition=asked.partition,
        account=asked.account,
        qos=asked.qos,
        others=asked.others(),
    )
    return slurm.Slurm(out, request)


def _minutes(jobs: Sequence[Job]) -> int:
    """Time of a Slurm job, if it is not given."""
    longest = max((job.minutes or 0 for job in jobs), default=0)
    return math.ceil(min(_LONGEST, max(_SHORTEST, _MARGIN * longest)))


def _about_time(jobs: Sequence[Job]) -> str:
    """Where the time of a Slurm job comes from, if it is not given."""
    why, timed = [], {"train": "training", "cell": "evaluation"}
    for kind, what in timed.items():
        if seconds := [60 * (job.minutes or 0) for job in jobs if job.kind == kind]:
            why.append(f"the longest {what} takes about {text.duration(max(seconds))}")
    if unknown := sum(job.kind in timed and job.minutes is None for job in jobs):
        why = [f"the time of {unknown} of {text.count(len(jobs), 'job')} is not known here"]
    return (
        f"Each worker asks for {_minutes(jobs)} minutes: {' and '.join(why)}. A cell that takes "
        "longer goes on in the next job; --time sets another limit."
    )


def _ray(out: Path, asked: Asked, jobs: Sequence[Job], memory: float) -> ray.Ray:
    request = ray.Request(
        memory=round(memory),
        cpus=asked.cpus_per_task or 1,
        gpus=asked.gpus or 0,
        address=asked.cluster_address,
    )
    return ray.Ray(out, request)


def _memory(asked: Asked, jobs: Sequence[Job], processes: int) -> float:
    """Bytes that each worker asks for, whose cells take so many processes at once; the memory of
    the jobs is that of one of these.

    Raises:
        UserError: a job needs more than was given, or the need is not known.
    """
    given = slurm.memory_of(asked.mem) if asked.mem else None
    needs = [job.memory for job in jobs if job.memory]
    factor, more = _SPARE
    if given is None:
        if not needs:
            raise UserError("The memory that the cells need is not known here; give it by --mem.")
        return processes * (max(needs) * factor + more)
    if asked.gpus:  # the estimate is of the GPU's memory
        return given
    if large := [need for need in needs if need * processes > given]:
        raise UserError(
            f"{text.count(len(large), 'job')} of {len(jobs)} would not fit into --mem {asked.mem}: "
            f"the largest needs {amount(max(large))}."
        )
    return given


def _options(
    machine: Mapping[str, Any], device: str, processes: int, memory: float | None
) -> tuple[str, ...]:
    """Options of `backfire work`."""
    named = {"device": device, "workers": processes if device == "cpu" else machine.get("workers")}
    named |= {key: machine.get(key) for key in ("devices", "micro_batch", "eval_batch")}
    named["memory"] = memory and f"{memory / 1e9:.3f}"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in named.items() if v is not None]
    options += ["--recompute"] * bool(machine.get("recompute"))
    options += ["--packing=off"] * (machine.get("packing") == "off")
    options += [f"--join={join}"] if (join := machine.get("join", "off")) != "off" else []
    files = [plugin.path for plugin in loaded() if plugin.path]
    return (*options, *(f"--plugin={file.absolute()}" for file in files))
