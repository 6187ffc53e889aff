"""Measures how fine-tuning a language model goes wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backfire.results.groups import Group

# PEFT imports bitsandbytes if it is installed, which then logs what is missing on this machine.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

# On a CPU torch keeps 1,024 prepared products, one for each shape, and packed rows have a new shape
# in nearly every pass: a process would grow by about 1 GB. Both are read at the first product.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

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
