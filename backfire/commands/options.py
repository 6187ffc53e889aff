"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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
Profile = Annotated[str | None, typer.Option(help="One of the recipe's profiles, such as paper.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; runs/<recipe> if not given.", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
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
        help="json: everything on stderr is one JSON object a line.",
        callback=_log_as,
        is_eager=True,
    ),
]
"""It applies before the command starts."""
