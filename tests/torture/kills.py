"""Processes killed with SIGKILL at random times, and started again until the work is done."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tests.torture.cell import KINDS, outputs, run_cell
from tests.torture.child import Child
from tests.torture.row import Figures, Ground, row

PER_CELL = 4
"""Kills before a cell may end."""


@row(
    "A process that runs one cell (LoRA, full tuning, Lisa or EWC, a checkpoint after every step) "
    "is killed with SIGKILL, every other time while it writes a checkpoint, and started again, "
    f"{PER_CELL} times before it may end; weights, samples and numbers are compared with those of "
    "an uninterrupted run.",
    full=200,
    small=20,
    zero=("not_resumed", "differing_files", "missing_files"),
    some=("cells", "kills", "in_saves"),
)
def cell_kills(count: int, ground: Ground) -> Figures:
    rng, found = Random(0), Counter[str]()
    whole: dict[str, Any] = {}
    while found["kills"] < count:
        kind = list(KINDS)[found["cells"] % len(KINDS)]
        if kind not in whole:
            whole[kind] = _uninterrupted(ground.root / kind, ground.tiny, kind)
        expected, seconds, save_seconds = whole[kind]
        root = ground.root / "killed"
        for number in range(min(PER_CELL, count - found["kills"])):
            child = Child(run_cell, root, ground.tiny, kind)
            saving = number % 2 == 1 and _reaches_a_save(child, rng)
            if saving:
                time.sleep(rng.uniform(0, save_seconds))
            else:
                child.wait(rng.uniform(0, seconds))
            if not child.process.is_alive():
                found["ended_before"] += 1
                break
            child.kill()
            found["kills"] += 1
            found["in_saves"] += _last_word(child, "save" if saving else None) == "save"
        found["cells"] += 1
        ended = Child(run_cell, root, ground.tiny, kind).result()
        found["not_resumed"] += ended is None or set(ended["ended"]) != {"ok"}
        got = outputs(root)
        found["missing_files"] += len(expected.keys() - got.keys())
        found["differing_files"] += sum(got[name] != expected.get(name) for name in got)
        shutil.rmtree(root)
    names = ("cells", "kills", "in_saves", "not_resumed", "missing_files", "differing_files")
    return {name: found[name] for name in names}


def _uninterrupted(root: Path, tiny: Path, kind: str) -> tuple[dict[str, str], float, float]:
    """Its outputs, its seconds, and those of one checkpoint."""
    begun = time.monotonic()
    ended = Child(run_cell, root, tiny, kind).result()
    assert set(ended["ended"]) == {"ok"}, ended
    return outputs(root), time.monotonic() - begun, ended["save_seconds"]


def _reaches_a_save(child: Child, rng: Random) -> bool:
    """Read what the child says until it begins one of its next few checkpoints."""
    left = rng.randint(1, 4)
    while (word := child.said()) is not None:
        left -= word == "save"
        if not left:
            return True
    return False


def _last_word(child: Child, last: Any) -> Any:
    """The last that a killed child said; `last` is what was read of it before."""
    try:
        while (word := child.said(1)) is not None:
            last = word
    except (RuntimeError, TimeoutError):
        return last
    return last
