"""A command line of backfire in a child process, with all that it printed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.torture.cell import Say


def command_lines(say: Say, folder: Path, lines: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run each command line in this process and folder; returns exit codes and output."""
    return [command_line(folder, line) for line in lines]


def command_line(folder: Path, line: Sequence[str]) -> dict[str, Any]:
    """`traceback` is the one of an error that backfire let through."""
    from backfire import cli

    os.environ["BACKFIRE_CACHE"] = str(folder / "cache")
    out, code, failure = io.StringIO(), 0, ""
    sys.argv = ["backfire", *line]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            failure = traceback.format_exc()
    return {"code": code, "printed": out.getvalue(), "traceback": failure}
