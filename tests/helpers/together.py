"""Training runs of one base, together and alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from backfire.experiment import Train
from backfire.model.fan import Fan, Share, fanned, twin
from backfire.model.fused import rounded_once
from backfire.model.load import load_base
from backfire.model.products import fast_products
from backfire.progress import silent
from backfire.registry import build
from backfire.train.loop import TrainingRun, train, train_each
from backfire.train.packing import same_packs
from backfire.train.precision import Precision, disable_adapter_casts, exact_attention
from backfire.train.together import Together
from tests.helpers.training import CPU

# (LoRA's rank, learning rate, seed, rows a step, steps)
CELLS = [(4, 2e-3, 5, 6, 30), (8, 1e-3, 6, 4, 30), (4, 3e-3, 7, 8, 12)]
SHORT = [(4, 2e-3, 5, 6, 8), (8, 1e-3, 6, 4, 8), (4, 3e-3, 7, 8, 6)]


def bases(tiny: Path, method: Any, count: int, change: Any = exact_attention) -> list[Any]:
    """A base, and models with its weights."""
    bits = build("methods", method).quantization("cpu")
    base = change(load_base(tiny, torch.float32, CPU, bits))
    others = [twin(base) for _ in range(count - 1)]
    for other in others:
        same_packs(other, base)
    return [base, *others]


def new(
    model: Any,
    rows: Any,
    folder: Path,
    cell: Any,
    *,
    method: Any = "lora",
    defense: Any = None,
    compute: str = "float32",
    **knobs: Any,
) -> TrainingRun:
    """A run on these rows; `rows` may hold those of an alignment too. `method`: a name, or a name
    with settings."""
    rank, rate, seed, size, count = cell
    folder.mkdir(exist_ok=True, parents=True)
    named = method if isinstance(method, dict) else {"name": method}
    settings = {**named, "rank": rank, "alpha": 3 * rank}
    adapted = build("methods", settings).attach(model, seed)
    if compute != "float32":
        disable_adapter_casts(adapted)
    extra = rows if isinstance(rows, dict) else {"user": rows}
    return TrainingRun(
        adapted,
        extra["user"],
        Train.make({"max_steps": count, "batch_size": size, "schedule": "constant"}),
        learning_rate=rate,
        seed=seed,
        folder=folder,
        name=f"run {seed}",
        defenses=[build("defenses", defense)] if defense else [],
        aligned=extra.get("align", ()),
        harmful=extra.get("harmful", ()),
        **knobs,
    )


def alone(cell: TrainingRun, compute: Any = "float32") -> dict[str, Any]:
    with rounded_once(cell.model, compute), fast_products(cell.model, compute):
        return train([cell], Precision(CPU, compute))[0]


def joined(cells: Sequence[TrainingRun], compute: Any = "float32", **options: Any) -> list[Any]:
    """What `train_each` gives for these runs together; most of the passes must have several."""
    with ExitStack() as stack:
        fan = stack.enter_context(fanned([cell.model for cell in cells], compute))
        for cell in cells:
            stack.enter_context(fast_products(cell.model, compute))
        made = Together(cells, fan, tokens=math.inf)
        sizes = passes(fan)
        reports = options.pop("progress", [silent] * len(cells))
        ends = train_each(cells, Precision(CPU, compute), reports, together=made, **options)
        assert max(sizes) > 1
        return ends


def passes(fan: Fan) -> list[int]:
    """The number of runs in each pass that is divided from now on."""
    real, sizes = fan.divided, list[int]()

    def divided(shares: Sequence[Share]) -> Any:
        sizes.append(len({number for number, *_ in shares}))
        return real(shares)

    cast(Any, fan).divided = divided
    return sizes


def each(
    tiny: Path, rows: Any, folder: Path, cells: Sequence[Any] = CELLS, **knobs: Any
) -> list[TrainingRun]:
    """A run of each of the cells, on one base."""
    change = knobs.pop("change", exact_attention)
    models = bases(tiny, knobs.get("method", "lora"), len(cells), change)
    return [
        new(model, rows, folder / f"{number}", cell, **knobs)
        for number, (model, cell) in enumerate(zip(models, cells, strict=True))
    ]
