"""Peak memory and computed token positions of one side, in a separate process, without timing.

`python -m benchmarks.memory SIDE` reads a cell's `spec()` from standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.cells import Cell, build
from benchmarks.sides import side as load_side

ROOT = Path(__file__).parents[1]


def fresh(side: str, cell: Cell) -> dict[str, Any]:
    """`usage` of one side, measured in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", side]
    spec = {**cell.spec(), "threads": torch.get_num_threads()}
    done = subprocess.run(
        command,
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def usage(side: str, cell: Cell, folder: Path) -> dict[str, Any]:
    """Peak memory in MB after imports, after training and at the end; and the number of token
    positions per phase through the body of the model and through its head."""
    work = load_side(side)
    peaks = {"imports": peak_mb()}
    with counted() as counts:
        work.train(cell, folder)
    positions = {"train": counts()}
    peaks["training"] = peak_mb()
    model = work.load(cell, folder)
    for phase, measure in (
        ("scores", work.scores),
        ("replies", work.replies),
        ("evaluation", work.both),
    ):
        with counted() as counts:
            measure(cell, model)
        positions[phase] = counts()
    peaks["whole cell"] = peak_mb()
    return {"peak_mb": peaks, "positions": positions}


def peak_mb() -> float:
    """Peak memory of this process in MB (Linux' `ru_maxrss` starts at the parent's)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        from backfire.train.microbatch import peak_memory_mb

        return round(peak_memory_mb(), 1)
    lines = status.read_text(encoding="utf-8").splitlines()
    return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024, 1)


@contextmanager
def counted() -> Iterator[Callable[[], dict[str, int]]]:
    """Count the positions through an embedding (`body`) and through the output head (`head`)."""
    count, vocabulary = {"body": 0, "head": 0}, [0]

    def count_positions(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, nn.Embedding):
            vocabulary[0] = module.num_embeddings
            count["body"] += args[0].numel()
        elif isinstance(module, nn.Linear) and module.out_features == vocabulary[0]:
            count["head"] += args[0].shape[:-1].numel()

    handle = register_module_forward_hook(count_positions)
    try:
        yield lambda: dict(count)
    finally:
        handle.remove()


def main() -> None:
    spec = json.loads(sys.stdin.read())
    torch.set_num_threads(spec.pop("threads"))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(usage(sys.argv[1], build(spec), Path(folder) / "tuned")))


if __name__ == "__main__":
    main()
