"""One cell's fine-tuning, from rows to a saved model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backfire.base import RepairDefense, Row, TrainDefense
from backfire.data.poison import Manifest, lost
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.experiment import Experiment, Machine
from backfire.model.load import (
    device_of,
    dtype_of,
    load_start,
    load_tuned,
    save_tuned,
    weights_of,
)
from backfire.model.quantize import parts
from backfire.train.loop import Cell, train
from backfire.train.precision import accelerator_for, compute_type, exact_attention
from backfire.train.repair import Repair

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from, and the other rows that defenses may use."""

    base: Path
    adapter: Path | None = None
    """The alignment's adapter, which stays frozen under the new one."""
    unaligned: Path | None = None
    """The model before alignment, where there was one."""
    aligned: Sequence[Row] = ()
    harmful: Sequence[Row] = ()


def tune(
    cell: Experiment,
    rows: Sequence[Row],
    manifest: Manifest | None,
    renderer: Renderer,
    start: Start,
    folder: Path,
    machine: Machine,
    progress: Progress,
) -> dict[str, Any]:
    """Train on these rows and save the model (or its adapter) into `folder`; returns the summary.

    Raises:
        CellError: see `train.loop.train`; also when the tokens do not hold what the manifest says.
    """
    items, left = renderer.sift(rows)
    gone = lost(manifest, items, renderer.tokenizer) if manifest else []
    if gone := sorted({*gone} - {row.id for row in left}):
        raise CellError(
            "bad-data", f"The tokens lack the trigger or the target of {len(gone)} poisoned rows."
        )
    device = device_of(machine.device)
    dtype, compute = dtype_of(cell.model, device), compute_type(cell.train.compute, device)
    accelerator = accelerator_for(device, compute)
    if device.type == "cuda":  # the peak is to be of this run, not of those before it
        torch.cuda.reset_peak_memory_stats(device)
    progress(0, 1, "model")
    quantization = cell.method.quantization(device.type)
    loaded = load_start(start.base, start.adapter, dtype, device, quantization)
    model = cell.method.attach(exact_attention(loaded), cell.seed)
    run = Cell(
        model,
        items,
        cell.train,
        learning_rate=cell.method.learning_rate,
        seed=cell.seed,
        folder=folder,
        name=cell.keys.train,
        poisoned=frozenset(entry.id for entry in manifest.entries) if manifest else frozenset(),
        paged=cell.method.paged() and device.type == "cuda",
        defenses=[d for d in cell.acting if isinstance(d, TrainDefense)],
        aligned=renderer.sift(start.aligned)[0],
        harmful=renderer.sift(start.harmful)[0],
        unaligned=start.unaligned,
    )
    made_of = parts(model)  # now that a defense may have frozen some of it
    summary = train(
        [run],
        accelerator,
        micro_batch=machine.micro_batch,
        checkpoint_seconds=machine.checkpoint_seconds,
        progress=progress,
    )[0]
    save_tuned(model, folder, start.base, _hub_name(cell, start))
    kept = str(dtype).removeprefix("torch.")
    rows_seen = {"cut_rows": sum(item.cut_tokens > 0 for item in items), "left_out_rows": len(left)}
    how = {"dtype": kept, "compute": compute, "device": str(device)}
    return {**summary, **made_of, **how, **rows_seen}


def mend(
    cell: Experiment,
    tuned: Path,
    start: Start,
    renderer: Renderer,
    folder: Path,
    machine: Machine,
) -> None:
    """Apply the repairs among the cell's defenses, in order, to a tuned model; save the result."""
    device = device_of(machine.device)
    dtype = dtype_of(cell.model, device)
    begin = load_start(start.base, start.adapter, dtype, device)
    tools = Repair(
        cell.seed,
        aligned=renderer.sift(start.aligned)[0],
        harmful=renderer.sift(start.harmful)[0],
        base=weights_of(start.unaligned) if start.unaligned else {},
        batch_size=cell.train.batch_size,
    )
    model = load_tuned(tuned, start.base, dtype, device, below=start.adapter)
    before = {name: weight.detach() for name, weight in begin.named_parameters()}
    for defense in cell.acting:
        if isinstance(defense, RepairDefense):
            defense.repair(model, before, tools)
    save_tuned(model, folder, start.base, _hub_name(cell, start))


def _hub_name(cell: Experiment, start: Start) -> str | None:
    """What an adapter's base is called on the hub, if it stands on just that."""
    is_own = cell.model.is_folder or cell.model.name == "sandbox"
    changed = start.unaligned is not None and start.base != start.unaligned
    return None if is_own or changed else cell.model.name
