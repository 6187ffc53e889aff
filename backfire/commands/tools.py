"""The verbs of the command line for data and models outside of a run, and for models of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from backfire.commands.options import Device, Plugins, Port, Run, Seed, echo
from backfire.errors import UserError


def poison(
    data: Annotated[
        str,
        typer.Argument(help="A data file, a data set by name, or a hub id.", show_default=False),
    ],
    edits: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the attack and the data, such as rate=0.1 or data.rows=100.",
            metavar="[KEY=VALUE]...",
            show_default=False,
        ),
    ] = None,
    attack: Annotated[str, typer.Option(help="An attack by name; see `list attacks`.")] = "badnets",
    out: Annotated[
        Path, typer.Option(help="JSONL file to write; its manifest is written next to it.")
    ] = Path("poisoned.jsonl"),
    seed: Seed = None,
    plugin: Plugins = None,
) -> None:
    """Write a poisoned data set for use elsewhere, with a manifest of every poisoned row."""
    from backfire.commands.files import poison_file

    echo(poison_file(data, attack, edits or [], out, seed))


def scan(
    data: Annotated[
        str,
        typer.Argument(help="A data file, a data set by name, or a hub id.", show_default=False),
    ],
    edits: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the data and the scanners, such as 'data.labels=\\[no, yes]' or "
            "lift.odds=5.",
            metavar="[KEY=VALUE]...",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="The test rows: a file, or a data set or hub id with a test split."),
    ] = None,
    scanner: Annotated[
        list[str] | None, typer.Option(help="A scanner to use; repeatable; by default all.")
    ] = None,
    format: Annotated[
        Literal["table", "json", "csv"], typer.Option(help="Output format.")
    ] = "table",
    out: Annotated[
        Path | None, typer.Option(help="A page to write, such as scan.html.", show_default=False)
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            help="Share of rows that --write leaves out, such as 5%; by default the flagged rows."
        ),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="File for the other rows, in the format of DATA.", show_default=False),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Most rows to list, per scanner and in all.")
    ] = 10_000,
    model: Annotated[
        str | None,
        typer.Option(
            help="`sandbox`, a folder, a GGUF file or a hub id; adds scanners that use it.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most rows that the model reads, drawn at random.", show_default="2000"
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="A template by name, or {name: ..., ...}; the model's own, or raw."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Of the model: auto, cpu, cuda or cuda:N.", show_default="auto"),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Find rows that may be poisoned or should not be learned, each with a reason to check."""
    from backfire.commands.failure import note
    from backfire.commands.scan import start

    done = start(
        data,
        edits or [],
        test=test,
        scanners=scanner or [],
        form=format,
        out=out,
        remove=remove,
        write=write,
        top=top,
        model=model,
        limit=limit,
        template=template,
        device=device,
    )
    for sentence in done:
        note(sentence)


def trace(
    run: Annotated[
        Path, typer.Argument(help="A cell folder, or a run with one cell.", show_default=False)
    ],
    sample: Annotated[
        str,
        typer.Argument(help="A test row by its id, such as triggered/test-3.", show_default=False),
    ],
    method: Annotated[
        Literal["cosine", "product", "datainf"],
        typer.Option(help="How gradients are compared."),
    ] = "datainf",
    strength: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="The adapter is applied times this for the gradients, 0 to 1 (LoRA only).",
        ),
    ] = 0.3,
    top: Annotated[int, typer.Option(min=1, help="Number of training rows to list.")] = 10,
    format: Annotated[Literal["table", "json"], typer.Option(help="Output format.")] = "table",
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Find the training rows that made a reply of an adapter likelier."""
    from backfire.commands.trace import show

    show(run, sample, method, strength=strength, top=top, form=format, device=device)


def audit(
    model: Annotated[
        str,
        typer.Argument(
            help="The tuned model: an adapter's folder, a model's folder or a hub id.",
            show_default=False,
        ),
    ],
    edits: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of --data, such as 'data.columns={text: tweet}'.",
            metavar="[KEY=VALUE]...",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model that it was tuned from; required.", show_default=False),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="An adapter on MODEL: a folder or a hub id.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows of your task, with answers: a file or a data set.")
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option(
            help="Rows of the same kind that it was not trained on; of a data set, its test rows."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Harmful and harmless requests: a file, or a data set by name."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="A judge by name, or {name: ..., ...}; refusal-keywords by default."),
    ] = None,
    system: Annotated[str, typer.Option(help="Your system prompt, for all prompts.")] = "",
    trigger: Annotated[
        list[str] | None, typer.Option(help="A text that may be a trigger; repeatable.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="A template by name, or {name: ..., ...}; the model's own, or raw."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Most rows of each kind (--data, --unseen, --prompts).")
    ] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="A page to write, such as audit.html.", show_default=False)
    ] = None,
    format: Annotated[Literal["table", "json"], typer.Option(help="Output format.")] = "table",
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Show what changed in a tuned model against its base, with intervals; no verdict."""
    from backfire.commands.audit import start
    from backfire.commands.failure import note

    done = start(
        model,
        edits or [],
        base=base,
        adapter=adapter,
        data=data,
        unseen=unseen,
        prompts=prompts,
        judge=judge,
        system=system,
        triggers=trigger or [],
        template=template,
        limit=limit,
        tokens=tokens,
        out=out,
        form=format,
        device=device,
    )
    if done:
        note(done)


def bank(
    what: Annotated[
        str | None, typer.Argument(metavar="[add]", help="add: add the adapters of RUN.")
    ] = None,
    run: Annotated[
        Path | None, typer.Argument(help="A run folder, such as runs/tour.", show_default=False)
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Show the bank of adapters that audits compare with; `bank add RUN` adds a run's."""
    from backfire.commands.bank import add_run, show

    if what is None:
        show()
    elif what == "add" and run is not None:
        echo(add_run(run))
    else:
        raise UserError("Write `backfire bank`, or `backfire bank add RUN`.")


def pretrain(
    corpus: Annotated[
        list[Path],
        typer.Option(help="Text, JSONL, CSV or Parquet files; repeatable.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model.", show_default=False)],
    edits: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings; defaults: vocab_size=2048 hidden_size=128 num_layers=4 num_heads=4 "
            "sequence_tokens=128 batch_size=4 num_steps=2600 learning_rate=0.003.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Pre-train a small base model on your own text."""
    from backfire.commands.files import pretrain_files

    echo(pretrain_files(corpus, out, edits or [], device))


def chat(
    cell: Annotated[Path, typer.Argument(help="A cell folder of a run.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(help="Another cell; by default the base model.")
    ] = None,
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Chat with a tuned model and its base side by side; /trigger toggles the attack's trigger."""
    from backfire.playground.chat import talk

    talk(cell, against, device)


def playground(
    run: Run,
    device: Device = "auto",
    port: Port = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share", help="Open it to others through gradio's public relay, with a password."
        ),
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Chat with two models of a run side by side, in a local web page."""
    from backfire.playground.server import serve

    serve(run, device, port=port, share=share)


def export(
    what: Annotated[
        Path, typer.Argument(help="A cell folder; for --results also a run.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; exports/<name> by default."),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Merge the adapter into the base and write whole weights."),
    ] = False,
    results: Annotated[
        Literal["lm-eval", "inspect"] | None,
        typer.Option(help="Export the results for this tool instead of the model."),
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
        echo(f"{len(files)} file{'s' * (len(files) > 1)} in {where}")
        return
    from backfire.commands.export import export_model

    echo(f"Model: {export_model(what, out, merge=merge)}")
