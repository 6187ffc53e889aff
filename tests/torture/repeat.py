"""The same recipe again: on one process and on two, and by two supervisors at once."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.torture.cell import SETTINGS, outputs
from tests.torture.child import Child
from tests.torture.command import command_lines
from tests.torture.row import Figures, Ground, row

MATRIX: dict[str, Any] = {"method": ["full", {"name": "lora", "rank": 4}], "attack.rate": [0, 0.2]}


def start(root: Path, tiny: Path, workers: int) -> Child:
    """`backfire run` of four cells in a process of its own."""
    root.mkdir(exist_ok=True)
    settings = {**SETTINGS, "model": str(tiny), "train": {"max_steps": 3, "batch_size": 8}}
    (root / "r.yaml").write_text(f"# Does it?\n{yaml.safe_dump({**settings, 'matrix': MATRIX})}")
    line = ["run", "r.yaml", "--out", "out", "--workers", str(workers)]
    return Child(command_lines, root, [line])


@row(
    "The same recipe of four cells is run twice by one process and once by two; weights, samples "
    "and numbers are compared byte by byte.",
    full=5,
    small=1,
    zero=("failed_runs", "differing_files"),
    some=("files",),
)
def same_again(count: int, ground: Ground) -> Figures:
    found = Counter[str]()
    for _ in range(count):
        results = []
        for name, workers in (("one", 1), ("again", 1), ("two", 2)):
            [ended] = start(ground.root / name, ground.tiny, workers).result()
            found["failed_runs"] += ended["code"] != 0
            results.append(outputs(ground.root / name))
            shutil.rmtree(ground.root / name)
        first, *others = results
        found["files"] += len(first)
        found["differing_files"] += sum(
            first.get(name) != other.get(name) for other in others for name in first.keys() | other
        )
    return {name: found[name] for name in ("files", "failed_runs", "differing_files")}


LOOKS = (["--help"], ["validate", "tour"], ["status", "run"])


@row(
    "`backfire --help`, `validate` and `status` of 24 cells are started in processes of their own; "
    "the least processor time of each is compared with half a second. (Other work on the machine "
    "does not count in it.)",
    full=10,
    small=0,  # tests/test_imports.py looks at what they import
    zero=("slower_than_half_a_second",),
    some=("seconds_for_help", "seconds_for_validate", "seconds_for_status"),
)
def fast_start(count: int, ground: Ground) -> Figures:
    from tests.helpers.fake_run import dose_run

    dose_run(ground.root, rows=20).rename(ground.root / "run")
    found: dict[str, float] = {}
    for line in LOOKS:
        name = f"seconds_for_{line[0].strip('-')}"
        found[name] = round(min(_seconds(ground.root, line) for _ in range(count)), 3)
    slow = sum(seconds >= 0.5 for seconds in found.values())
    return {**found, "slower_than_half_a_second": slow}


def _seconds(folder: Path, line: list[str]) -> float:
    """Processor time of a command."""
    from tests.helpers.places import ROOT

    command = [sys.executable, "-m", "backfire.cli", *line]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
