"""A disk that is full before the work is done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from backfire.store import intact, read_json
from tests.torture import mounts
from tests.torture.cell import Say, outputs, run_cell, stages_in
from tests.torture.child import Child
from tests.torture.row import Figures, Ground, NotHere, row

BIG = 512 * 2**20


@row(
    "A cell runs on a file system in memory of a random size that is too small, until it fails; "
    "then the file system grows and the same cell is run again.",
    full=50,
    small=5,
    zero=("other_exit_classes", "torn_stages", "torn_results", "not_finished", "differing_files"),
    some=("disk_full",),
)
def disk_full(count: int, ground: Ground) -> Figures:
    rng, found = Random(0), Counter[str]()
    whole = _child(ground.root / "whole", ground.tiny, BIG)
    for number in range(count):
        size = rng.randrange(64 * 2**10, max(whole["peak"], 65 * 2**10))
        tried = _child(ground.root / str(number), ground.tiny, size)
        kinds = set(tried["first"]) - {"ok"}
        found["fitted"] += not kinds
        found["disk_full"] += kinds == {"disk-full"}
        found["other_exit_classes"] += bool(kinds - {"disk-full"})
        found["torn_stages"] += tried["torn_stages"]
        found["torn_results"] += tried["torn_results"]
        found["not_finished"] += set(tried["second"]) != {"ok"}
        found["differing_files"] += tried["files"] != whole["files"]
    names = ("disk_full", "fitted", "other_exit_classes", "torn_stages", "torn_results")
    return {name: found[name] for name in (*names, "not_finished", "differing_files")}


def _child(root: Path, tiny: Path, size: int) -> dict[str, Any]:
    found: dict[str, Any] = Child(_on_small_disk, root, tiny, size).result()
    if "lacks" in found:
        raise NotHere(found["lacks"])
    return found


def _on_small_disk(say: Say, root: Path, tiny: Path, size: int) -> dict[str, Any]:
    """Run the cell on a disk of `size` bytes, and again on a large one."""
    try:
        mounts.alone()
        mounts.memory_disk(root, size)
    except NotHere as lacking:
        return {"lacks": str(lacking)}
    quiet: Say = lambda value: None  # noqa: E731
    first = run_cell(quiet, root, tiny, "lora")["ended"]
    torn_stages = [folder for folder in stages_in(root) if not intact(folder)]
    torn_results = [p for p in root.glob("out/cells/*/*.json") if not _readable(p)]
    peak = _used(root)
    mounts.memory_disk(root, BIG, again=True)
    second = run_cell(quiet, root, tiny, "lora")["ended"]
    counts = {"torn_stages": len(torn_stages), "torn_results": len(torn_results)}
    return {"first": first, "second": second, "peak": peak, "files": outputs(root), **counts}


def _readable(file: Path) -> bool:
    try:
        read_json(file)
    except (OSError, ValueError):
        return False
    return True


def _used(root: Path) -> int:
    """Bytes of all files, in blocks of 4 KiB."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in root.rglob("*") if p.is_file())
