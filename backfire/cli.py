"""The command line. Each command imports what it needs when called, so `--help` is fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backfire.commands.failure import fail, fail_or_raise
from backfire.commands.options import Device, Edits, LogFormat, Out, Plugins, Profile, Recipe, Run
from backfire.errors import CellError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure how fine-tuning a language model goes wrong.\n\nStart with: backfire run tour",
)


def _version(wanted: bool) -> None:
    if wanted:
        from backfire import __version__

        _echo(f"backfire {__version__}")
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
            raise KeyboardInterrupt if code == 130 else SystemExit(code)  # Ctrl-C becomes 130
    except (UserError, CellError) as error:
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        fail("Interrupted. Finished work is kept; run the same command again to continue.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        fail_or_raise(error)


def _echo(text: str) -> None:
    print(text)  # noqa: T201


# ------------------------------------------------------------------------------------- recipes


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    from backfire.commands.files import write_starter

    _echo(write_starter(path))


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
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cells run in parallel; by default one per core, or one on a GPU."
        ),
    ] = None,
    device: Device = "auto",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Most rows per forward pass in training.")
    ] = None,
    eval_batch: Annotated[
        int | None, typer.Option(min=1, help="Most rows per forward pass in evaluation.")
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Train in less memory by recomputing layers (activation checkpointing).",
        ),
    ] = False,
    log_format: LogFormat = "text",
    plugin: Plugins = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan without running it.")
    ] = False,
) -> None:
    """Run a recipe. Running the same command again does only what is missing."""
    from backfire.commands import validate
    from backfire.commands.run import start

    loaded = _load(recipe, profile, edits)
    if dry_run:
        validate.show_plan(loaded)
        return
    name = f"{loaded.name}-{profile}" if profile else loaded.name
    batches = {"micro_batch": micro_batch, "eval_batch": eval_batch}
    machine = {"device": device, "workers": workers, "recompute": recompute, **batches}
    failed = start(
        loaded,
        out or Path("runs") / name,
        {key: value for key, value in machine.items() if value is not None},
        profile=profile,
        edits=edits or (),
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def status(run: Run) -> None:
    """Show which cells of a run are done, failed or missing."""
    from backfire.commands.status import show

    show(run)


@app.command()
def results(
    run: Run,
    format: Annotated[
        Literal["table", "json", "csv"], typer.Option(help="Output format.")
    ] = "table",
    rescore: Annotated[
        list[str] | None,
        typer.Option(help="A metric to compute on the kept samples instead; repeatable."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Print every number of a run, one record per cell and metric."""
    from backfire.commands.rescore import rescored
    from backfire.results.load import records, write
    from backfire.results.terminal import print_records

    rows = rescored(run, rescore) if rescore else records(run)
    if format == "table":
        print_records(rows)
    else:
        _echo(write(rows, format).rstrip("\n"))


@app.command()
def report(run: Run, plugin: Plugins = None) -> None:
    """Write the run's page, report.html."""
    from backfire.report.page import write_report

    _echo(f"Wrote {write_report(run)}")


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
            help="attacks, methods, defenses, metrics, judges, datasets, templates or recipes."
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
    """Explain one component (its knobs, defaults and source) or print one recipe."""
    from backfire.commands.catalog import print_explained

    print_explained(name)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; printed if not given.")] = None,
    plugin: Plugins = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from backfire.commands.catalog import print_schema

    print_schema(out)


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe by name or by path.", show_default=False)
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


# ----------------------------------------------------------------------------- data and models


@app.command()
def poison(
    data: Annotated[
        str,
        typer.Argument(help="A data file, a data set by name, or a hub id.", show_default=False),
    ],
    edits: Edits = None,
    attack: Annotated[str, typer.Option(help="An attack by name; see `list attacks`.")] = "badnets",
    out: Annotated[
        Path, typer.Option(help="JSONL file to write; its manifest is written next to it.")
    ] = Path("poisoned.jsonl"),
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="Seed for drawing the poisoned rows; 0 if not given."
        ),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Write a poisoned data set for use elsewhere, with a manifest of every poisoned row."""
    from backfire.commands.files import poison_file

    _echo(poison_file(data, attack, edits or [], out, seed))


@app.command()
def pretrain(
    corpus: Annotated[
        list[Path],
        typer.Option(help="Text, JSONL, CSV or Parquet files; repeatable.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model.", show_default=False)],
    edits: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, such as hidden_size=192.", metavar="[KEY=VALUE]..."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Pre-train a small base model on your own text."""
    from backfire.commands.files import pretrain_files

    _echo(pretrain_files(corpus, out, edits or [], device))


@app.command()
def chat(
    cell: Annotated[Path, typer.Argument(help="A cell folder of a run.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(help="Another cell; the base model if not given.")
    ] = None,
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Chat with a tuned model and its base side by side; /trigger toggles the attack's trigger."""
    from backfire.playground.chat import talk

    talk(cell, against, device)


@app.command()
def playground(
    run: Run,
    device: Device = "auto",
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port on this machine; by default the first free one from 7860."
        ),
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Share it through gradio's relay, with a password."),
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Chat with two models of a run side by side, in a local web page."""
    from backfire.playground.server import serve

    serve(run, device, port=port, share=share)


@app.command()
def export(
    what: Annotated[
        Path, typer.Argument(help="A cell folder; for --results also a run.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; exports/<name> if not given."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the base.")
    ] = False,
    results: Annotated[
        Literal["lm-eval", "inspect"] | None,
        typer.Option(help="Export the numbers for this tool, instead of the model."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Write a cell's model (PEFT adapter or plain weights) or a run's results for other tools."""
    if results:
        if merge:
            raise UserError("--merge cannot be combined with --results; leave it out.")
        from backfire.commands.export import export_results

        files = export_results(what, out, results)
        where = os.path.commonpath([file.parent for file in files])
        _echo(f"{len(files)} file{'s' * (len(files) > 1)} in {where}")
        return
    from backfire.commands.export import export_model

    _echo(f"Model: {export_model(what, out, merge=merge)}")


def _load(recipe: str, profile: str | None, edits: list[str] | None) -> Any:
    from backfire.recipe import load

    return load(recipe, profile=profile, edits=edits or ())


if __name__ == "__main__":
    main()
