"""The command line in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from backfire import cli

pytestmark = pytest.mark.slow


def shell(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backfire.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )


def test_the_command_is_installed_under_its_name() -> None:
    (entry,) = entry_points(group="console_scripts", name="backfire")
    assert entry.load() is cli.main


def test_a_process_ends_with_the_code_and_the_sentence(tmp_path: Path) -> None:
    good = shell("show", "badnets", folder=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    bad = shell("run", "turo", folder=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "backfire: Unknown recipe 'turo'; did you mean 'tour'?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "backfire.cli", "show", "badnets"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(cli.__file__).parents[1],
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
