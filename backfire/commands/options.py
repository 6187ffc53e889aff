"""Arguments and options shared by several commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backfire.store import slug

Recipe = Annotated[
    str,
    typer.Argument(help="A recipe by name (see `list recipes`) or by path.", show_default=False),
]
Edits = Annotated[
    list[str] | None,
    typer.Argument(
        help="Edits, such as attack.rate=0.1 or seed=0.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
Profile = Annotated[
    str | None, typer.Option(help="One of the recipe's profiles, such as paper; none by default.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; runs/<recipe> by default.", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Devices = Annotated[
    int | None,
    typer.Option(min=1, help="Devices that train each cell together; 1 by default."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Cells run in parallel; by default one per core if memory allows, or per GPU."
    ),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most rows per forward pass in training; by default as memory allows."
    ),
]
EvalBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Most rows per forward pass in evaluation; by default up to 64."),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        help="Recompute layers in the backward pass: less memory, more time (activation "
        "checkpointing).",
    ),
]
Packing = Annotated[
    Literal["auto", "off"],
    typer.Option(help="auto: train on rows end to end where that saves padding; off: pad rows."),
]


def _join(value: str) -> str:
    if value in ("auto", "off") or (value.isdecimal() and 1 <= int(value) <= 64):
        return value
    raise typer.BadParameter("auto, off, or a number from 1 to 64 is needed.")


Join = Annotated[
    str,
    typer.Option(
        help="LoRA runs of one base trained in the same passes: off, a number up to 64, or "
        "auto (as many as save time). Results change by rounding.",
        callback=_join,
        metavar="auto|off|N",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(min=0, help="Stop after so many minutes, with a checkpoint; no limit by default."),
]
Memory = Annotated[
    float | None,
    typer.Option(min=0, help="Memory limit of a job in GB; by default all memory of this machine."),
]
WorkersDevice = Annotated[
    str, typer.Option(help="Device of the workers: auto (as on this machine), cpu or cuda.")
]
_CLUSTER = "Workers on a cluster"


def _cluster(help: str, name: str | None = None, **more: Any) -> Any:
    """An option of `--on slurm` and `--on ray`."""
    names = [name] if name else []
    return typer.Option(*names, help=help, rich_help_panel=_CLUSTER, show_default=False, **more)


On = Annotated[
    Literal["local", "slurm", "ray"],
    typer.Option(
        help="Where the workers run; on a cluster they share the folders of this machine."
    ),
]
Jobs = Annotated[int | None, _cluster("Most workers; by default one per cell, up to 8.", min=1)]
Partition = Annotated[str | None, _cluster("Slurm's partition; by default the cluster's.")]
Account = Annotated[str | None, _cluster("Slurm's account; by default yours.")]
Qos = Annotated[str | None, _cluster("Slurm's quality of service.")]
Time = Annotated[
    str | None,
    _cluster(
        "Time limit of a Slurm job, such as 4:00:00; the next job continues. By default twice the "
        "estimate, from 1 hour to 1 day."
    ),
]
Mem = Annotated[
    str | None, _cluster("Memory of each worker, such as 16G; by default by an estimate.")
]
Gpus = Annotated[int | None, _cluster("GPUs of each worker; none by default.", min=0)]
Cpus = Annotated[
    int | None, _cluster("CPUs of each worker; 1 by default.", "--cpus-per-task", min=1)
]
Sbatch = Annotated[
    list[str] | None,
    _cluster(
        "Another option of sbatch, such as constraint=a100; repeatable.", metavar="NAME[=VALUE]"
    ),
]
RayAddress = Annotated[
    str | None,
    _cluster("HOST:PORT of a Ray cluster; without it, Ray starts on this machine alone."),
]
OpenCluster = Annotated[
    bool,
    _cluster(
        "Use a Ray cluster without a token: only if nobody else reaches it.", "--open-cluster"
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan without running it.")]
Port = Annotated[
    int | None,
    typer.Option(
        min=1, max=65535, help="Port on this machine; by default the first free one from 7860."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Seed for drawing the poisoned rows; 0 by default."),
]
Run = Annotated[Path, typer.Argument(help="A run folder, such as runs/tour.", show_default=False)]


def _use(files: list[Path] | None) -> None:
    from backfire import plugins, registry

    for file in files or ():
        registry.use(plugins.from_file(file))


Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        help="A Python file with your own components; repeatable.",
        metavar="FILE",
        callback=_use,
        show_default=False,
    ),
]
"""The files are loaded before the command starts."""


def _log_as(form: str) -> str:
    if form == "json":
        from backfire.launch.log import use_json

        use_json()
    return form


LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(
        "--log-format",
        help="json: stderr has one JSON object per line.",
        callback=_log_as,
        is_eager=True,
    ),
]
"""It applies before the command starts."""


def folder_of(recipe: str, profile: str | None) -> Path:
    """The folder of a run that is given none. A name that would be another path is made safe: a
    recipe of somebody else chooses it."""
    name = f"{recipe}-{profile}" if profile else recipe
    safe = name if re.fullmatch(r"(?!\.+$)[\w .,+=@()-]{1,80}", name) else slug(name)
    return Path("runs") / safe


def machine_of(
    workers: int | None,
    device: str,
    devices: int | None,
    micro_batch: int | None,
    eval_batch: int | None,
    recompute: bool,
    packing: str,
    join: str,
) -> dict[str, Any]:
    """The settings of the machine that were given."""
    batches = {"micro_batch": micro_batch, "eval_batch": eval_batch}
    places = {"device": device, "devices": devices, "workers": workers}
    machine = {**places, "recompute": recompute, "packing": packing, "join": join, **batches}
    return {key: value for key, value in machine.items() if value is not None}


def echo(text: str) -> None:
    """Print the result of a command."""
    print(text)  # noqa: T201
