"""`backfire run` from Python, in a process of its own: for notebooks and scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from backfire.errors import CellError, UserError
from backfire.results.load import load
from backfire.store import write_atomic


def run_apart(recipe: str, edits: str | Sequence[str], out: Path, workers: int | None) -> None:
    """Run a recipe into `out` and print what is said meanwhile.

    In this process it would keep its models in the memory of a GPU, and workers would import a
    script that calls it once more.

    Raises:
        UserError: the recipe is not fit to run.
        CellError: a cell failed.
    """
    edits = [edits] if isinstance(edits, str) else edits
    if "\n" in recipe:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{out.name}.yaml", recipe)
        recipe = str(out / f"{out.name}.yaml")
    command = [sys.executable, "-m", "backfire.cli", "run", recipe, *edits, "--out", str(out)]
    command += ["--workers", str(workers)] if workers else []
    # A notebook's kernel forces colors on its children, which would draw as in a terminal.
    plain = {name: value for name, value in os.environ.items() if "FORCE" not in name}
    pipe, last = subprocess.PIPE, ""
    with subprocess.Popen(
        command,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        env={**plain, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout
        for line in process.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    if process.returncode == 0:
        return
    if process.returncode == 1:  # the rest is done; say what became of the first that is not
        failed = [cell for cell in load(out) if not cell.is_done]
        if failed:
            raise CellError(failed[0].status, f"{failed[0].slug}: {failed[0].error}")
    raise UserError(last.removeprefix("backfire: ") or f"backfire run ended {process.returncode}.")
