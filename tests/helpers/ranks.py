"""Training in several processes that are forked from the test: they need no import."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from backfire.base import Rendered
from backfire.experiment import Train
from backfire.model.load import load_base
from backfire.registry import build
from backfire.train.loop import TrainingRun
from backfire.train.ranks import Ranks
from backfire.train.sharding import gathered, shard
from tests.helpers.loop import METHODS
from tests.helpers.training import CPU, run


def joined(store: Path, rank: int, size: int) -> Ranks:
    """This process as a rank of a new process group."""
    where, wait = dist.FileStore(str(store), size), timedelta(seconds=240)
    dist.init_process_group("gloo", store=where, rank=rank, world_size=size, timeout=wait)
    return Ranks(rank, size, CPU, ["cpu"] * size)


def together(size: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each rank; fails with its errors."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            torch.save(work(joined(folder / "store", rank, size)), folder / f"{rank}.pt")
        except Exception:
            (folder / f"{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        dist.destroy_process_group()

    processes = [context.Process(target=one, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert not (errors := [file.read_text("utf-8") for file in folder.glob("*.txt")]), errors[0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def new_cell(
    tiny: Path,
    items: Sequence[Rendered],
    folder: Path,
    ranks: Ranks,
    method: str,
    *defenses: Any,
    **knobs: Any,
) -> TrainingRun:
    """The last of its steps has fewer rows than there are ranks."""
    ranks = replace(ranks)  # as every task gets new ones
    model = METHODS[method](load_base(tiny, torch.float32, CPU))
    if method == "full" and ranks.several:
        shard(model, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"epochs": 1, "batch_size": 7, "warmup_share": 0.0, "schedule": "constant"}
    return TrainingRun(
        model,
        items[:15],
        Train.make({**settings, **knobs}),
        learning_rate=2e-3,
        seed=5,
        folder=folder,
        name="run",
        defenses=[build("defenses", defense) for defense in defenses],
        aligned=items[22:32],
        harmful=items[30:40],
        ranks=ranks,
    )


def trained(cell: TrainingRun, **options: Any) -> dict[str, Any]:
    """Losses of the steps, trained weights, and summary."""
    summary = run(cell, **options)
    weights = gathered({n: p.detach() for n, p in cell.trainable.items()}, keep=True)
    return {
        "losses": [line["loss"] for line in cell.log],
        "norms": [line["gradient_norm"] for line in cell.log],
        "weights": {name: weight.clone() for name, weight in weights.items()},
        "summary": summary,
    }
