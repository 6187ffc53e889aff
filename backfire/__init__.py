"""Measures how fine-tuning a language model goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backfire.results.groups import Group

# PEFT imports bitsandbytes if it is installed, which then logs what is missing on this machine.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

__version__ = "0.1.0"
__all__ = ["__version__", "run"]


def run(
    recipe: str, edits: str | Sequence[str] = (), *, out: str | Path, workers: int | None = None
) -> list[Group]:
    """Run a recipe (name, path or YAML text) into the folder `out`; return its groups over seeds.

    This is `backfire run` in a separate process: its output is printed, finished cells are not run
    again, and no model stays in this process.

    Raises:
        UserError, CellError: the recipe cannot run, or a cell failed; in one sentence.
    """
    from backfire.commands.notebook import run_apart
    from backfire.results.load import summary

    run_apart(recipe, edits, Path(out), workers)
    return summary(Path(out))
