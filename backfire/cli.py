"""The command line. Each command imports what it needs when called, so `--help` is fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backfire.commands import tools
from backfire.commands.failure import INTERRUPTED, fail, fail_or_raise, interrupted
from backfire.commands.options import (
    Account,
    Cpus,
    Device,
    Devices,
    DryRun,
    Edits,
    EvalBatch,
    Gpus,
    Jobs,
    Join,
    LogFormat,
    Mem,
    Memory,
    MicroBatch,
    Minutes,
    On,
    OpenCluster,
    Out,
    Packing,
    Partition,
    Plugins,
    Profile,
    Qos,
    RayAddress,
    Recipe,
    Recompute,
    Run,
    Sbatch,
    Time,
    Workers,
    WorkersDevice,
    echo,
    folder_of,
    machine_of,
)
from backfire.errors import CellError, Interrupted, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure how fine-tuning a language model goes wrong.\n\nStart with: backfire run tour",
)


def _version(wanted: bool) -> None:
    if wanted:
        from backfire import __version__

        echo(f"backfire {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line; bad input and interruptions end with one sentence and code 2."""
    try:
        if code := app(standalone_mode=False):  # the code of a `typer.Exit` in a command
            raise (
                KeyboardInterrupt if code == INTERRUPTED else SystemExit(code)
            )  # Ctrl-C becomes 130
    except (UserError, CellError) as error:
        fail(str(error), INTERRUPTED if isinstance(error, Interrupted) else 2)
    except (KeyboardInterrupt, typer.Abort):
        interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        fail_or_raise(error)


# ------------------------------------------------------------------------------------- recipes


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    from backfire.commands.files import write_starter

    echo(write_starter(path))


@app.command()
def validate(
    recipe: Recipe, edits: Edits = None, profile: Profile = None, plugin: Plugins = None
) -> None:
    """Show the resolved recipe, its cells and stages, three rendered rows, and all checks."""
    from backfire.commands.validate import show

    show(_load(recipe, profile, edits))


@app.command()
def run(
    recipe: Recipe,
    edits: Edits = None,
    profile: Profile = None,
    out: Out = None,
    workers: Workers = None,
    device: Device = "auto",
    devices: Devices = None,
    micro_batch: MicroBatch = None,
    eval_batch: EvalBatch = None,
    recompute: Recompute = False,
    packing: Packing = "auto",
    join: Join = "off",
    log_format: LogFormat = "text",
    plugin: Plugins = None,
    dry_run: DryRun = False,
    on: On = "local",
    jobs: Jobs = None,
    cpus_per_task: Cpus = None,
    gpus: Gpus = None,
    mem: Mem = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    sbatch: Sbatch = None,
    ray_address: RayAddress = None,
    open_cluster: OpenCluster = False,
) -> None:
    """Run a recipe. Running the same command again does only what is missing."""
    from backfire.commands import cluster, validate
    from backfire.commands.run import start
    from backfire.train import members

    if members.serves():
        return
    sizes = (jobs, cpus_per_task, gpus, mem, time)
    slurm = (partition, account, qos, tuple(sbatch or ()))
    asked = cluster.Asked(on, *sizes, *slurm, ray_address, open_cluster)
    asked.refuse_strays()
    loaded = _load(recipe, profile, edits)
    if dry_run:
        validate.show_plan(loaded)
        return
    place = out or folder_of(loaded.name, profile)
    batches = (micro_batch, eval_batch, recompute, packing, join)
    machine = machine_of(workers, device, devices, *batches)
    edits = edits or []
    if on == "local":
        failed = start(loaded, place, machine, profile=profile, edits=edits)
    else:
        failed = cluster.start(loaded, place, asked, machine, profile=profile, edits=edits)
    if failed:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Recipe,
    edits: Edits = None,
    profile: Profile = None,
    out: Out = None,
    device: WorkersDevice = "auto",
    plugin: Plugins = None,
) -> None:
    """Fetch what a recipe needs and write its jobs, for `work` on any number of machines."""
    from backfire.commands.plan import write

    loaded = _load(recipe, profile, edits)
    place = out or folder_of(loaded.name, profile)
    echo(write(loaded, place, device, profile=profile, edits=edits or ()))


@app.command()
def work(
    run: Run,
    minutes: Minutes = None,
    memory: Memory = None,
    workers: Workers = None,
    device: Device = "auto",
    devices: Devices = None,
    micro_batch: MicroBatch = None,
    eval_batch: EvalBatch = None,
    recompute: Recompute = False,
    packing: Packing = "auto",
    join: Join = "off",
    log_format: LogFormat = "text",
    plugin: Plugins = None,
) -> None:
    """Do the jobs of a planned run, beside any number of other workers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the library is imported
    from backfire.commands.work import start
    from backfire.train import members

    if members.serves():
        return
    batches = (micro_batch, eval_batch, recompute, packing, join)
    settings = machine_of(workers, device, devices, *batches)
    if start(run, settings, minutes=minutes, memory=None if memory is None else memory * 1e9):
        raise typer.Exit(1)


@app.command()
def status(run: Run) -> None:
    """Show which cells of a run are done, failed or missing, and who works on what."""
    from backfire.commands.status import show

    show(run)


@app.command()
def results(
    run: Run,
    format: Annotated[
        Literal["table", "json", "csv"], typer.Option(help="Output format.")
    ] = "table",
    over_seeds: Annotated[
        bool,
        typer.Option("--over-seeds", help="Means over seeds with intervals, as in the report."),
    ] = False,
    rescore: Annotated[
        list[str] | None,
        typer.Option(help="A metric to compute from the kept samples instead; repeatable."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Print every number of a run, one record per cell and metric."""
    from backfire.commands.rescore import print_results

    print_results(run, format, rescore or [], over_seeds=over_seeds)


@app.command()
def report(run: Run, plugin: Plugins = None) -> None:
    """Write the run's page, report.html."""
    from backfire.report.page import write_report

    echo(f"Wrote {write_report(run)}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A cell folder or a run folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The other cell or run.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Compare even if the templates differ.")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Show which settings and numbers of two cells or runs differ, with paired tests."""
    from backfire.results.compare import compare as compare_cells
    from backfire.results.compare import show

    show(compare_cells(a, b, force=force))


# ---------------------------------------------------------------------------------- components


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="attacks, methods, defenses, metrics, judges, datasets, templates, scanners "
            "or recipes; by default all."
        ),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """List components and recipes, one per line; `show NAME` explains one."""
    from backfire.commands.catalog import print_list

    print_list(kind)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A component or a recipe.", show_default=False)],
    plugin: Plugins = None,
) -> None:
    """Explain one component (its settings, defaults and source) or print one recipe."""
    from backfire.commands.catalog import print_explained

    print_explained(name)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; printed by default.")] = None,
    plugin: Plugins = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from backfire.commands.catalog import print_schema

    print_schema(out)


@app.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe by name or by path; optional.", show_default=False),
    ] = None,
    edits: Edits = None,
    profile: Profile = None,
    plugin: Plugins = None,
) -> None:
    """Check the environment, and whether a recipe fits this machine."""
    from backfire.commands.doctor import show

    if recipe is None and profile is not None:
        raise UserError("--profile needs a recipe; name the recipe too.")
    show(None if recipe is None else _load(recipe, profile, edits))


@app.command()
def check(
    plugin: Annotated[str, typer.Argument(help="A Python file, or an installed package.")],
) -> None:
    """Run the contract tests of components over a plug-in."""
    from backfire.commands.check import check as check_plugin

    raise typer.Exit(1 if check_plugin(plugin) else 0)


@app.command()
def cache(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN | prune]", help="A run's folder; or prune, to remove what is not used."
        ),
    ] = None,
    older: Annotated[
        float, typer.Option(min=0, help="prune: only what was not used for this many days.")
    ] = 30.0,
    keep: Annotated[
        list[Path] | None,
        typer.Option(help="prune: a finished run whose models stay; repeatable.", metavar="RUN"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="prune: only list it, as without --yes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="prune: remove it without asking.")] = False,
) -> None:
    """Show what the cache holds, or what one run needs of it; `cache prune` makes room.

    What an unfinished run needs, and what is being built, always stays.
    """
    from backfire.commands.cache import prune, show

    if what == "prune":
        prune(older, keep or [], remove=yes and not dry_run)
    elif keep or yes or dry_run:
        raise UserError("--keep, --dry-run and --yes belong to `backfire cache prune`.")
    else:
        show(None if what is None else Path(what))


# ----------------------------------------------------------------------------- data and models

for verb in (
    *(tools.poison, tools.scan, tools.trace, tools.audit, tools.bank, tools.pretrain),
    *(tools.chat, tools.playground, tools.export),
):
    app.command()(verb)


def _load(recipe: str, profile: str | None, edits: list[str] | None) -> Any:
    from backfire.recipe import load

    return load(recipe, profile=profile, edits=edits or ())


if __name__ == "__main__":
    main()
