"""`backfire run` from Python, in a separate process, for notebooks and scripts."""

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
    """Run a recipe into `out` and print the output.

    A separate process releases the GPU memory of its models, and its workers do not import the
    calling script.

    Raises:
        UserError: the recipe cannot run.
        CellError: a cell failed.
    """
    edits = [edits] if isinstance(edits, str) else edits
    if "\n" in recipe:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{out.name}.yaml", recipe)
        recipe = str(out / f"{out.name}.yaml")
    command = [sys.executable, "-m", "backfire.cli", "run", recipe, *edits, "--out", str(out)]
    command += ["--workers", str(workers)] if workers else []
    # Notebook kernels force colors on child processes, which would then draw as in a terminal.
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
    if process.returncode == 1:  # the other cells are done; report the first failed one
        failed = [cell for cell in load(out) if not cell.is_done]
        if failed:
            raise CellError(failed[0].status, f"{failed[0].slug}: {failed[0].error}")
    raise UserError(
        last.removeprefix("backfire: ") or f"backfire run ended with code {process.returncode}."
    )
