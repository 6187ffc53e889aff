"""One cell's fine-tuning, from rows to a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from backfire import stages
from backfire.base import Rendered, RepairDefense, Row, TrainDefense
from backfire.base.judges import drop_models
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
from backfire.progress import Progress
from backfire.train.loop import TrainingRun, train
from backfire.train.microbatch import free
from backfire.train.precision import (
    accelerator_for,
    compute_type,
    exact_attention,
    without_casts,
)
from backfire.train.repair import Repair, plain_weights


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


@dataclass(frozen=True)
class _Other:
    """The rows that defenses use beside the user's, ready to be run; how many were too long."""

    aligned: list[Rendered]
    harmful: list[Rendered]
    left_out: dict[str, int]

    @classmethod
    def of(cls, start: Start, renderer: Renderer) -> _Other:
        aligned, harmful = renderer.sift(start.aligned), renderer.sift(start.harmful)
        counts = {"aligned": len(aligned[1]), "harmful": len(harmful[1])}
        return cls(aligned[0], harmful[0], {part: n for part, n in counts.items() if n})


def tune(
    experiment: Experiment,
    rows: Sequence[Row],
    manifest: Manifest | None,
    renderer: Renderer,
    start: Start,
    folder: Path,
    machine: Machine,
    progress: Progress,
) -> dict[str, Any]:
    """Train on these rows and save the model (or its adapter) into `folder`; returns the summary.
    Nothing of it stays in memory, nor a judge of the run before.

    Raises:
        CellError: see `_rendered` and `train.loop.train`.
    """
    device = device_of(machine.device)
    _make_room(device)
    items, left = _rendered(rows, manifest, renderer)
    other = _Other.of(start, renderer)
    dtype, compute = (
        start_type(experiment, start, device),
        compute_type(experiment.train.compute, device),
    )
    accelerator = accelerator_for(device, compute)
    progress(0, 1, "model")
    rate = experiment.learning_rate
    assert rate is not None, "a method that trains has a learning rate"
    model = _attached(experiment, start, device, dtype)
    if compute == "bfloat16":
        without_casts(model)
    run = TrainingRun(
        model,
        items,
        experiment.train,
        learning_rate=rate,
        seed=experiment.seed,
        folder=folder,
        name=stages.keys(experiment).train,
        poisoned=frozenset(entry.id for entry in manifest.entries) if manifest else frozenset(),
        paged=experiment.method.paged() and device.type == "cuda",
        defenses=[d for d in experiment.acting if isinstance(d, TrainDefense)],
        aligned=other.aligned,
        harmful=other.harmful,
        unaligned=start.unaligned,
        start=start.base,
        recompute=machine.recompute,
    )
    made_of = parts(model)  # now that a defense may have frozen some of it
    try:
        summary = train(
            [run],
            accelerator,
            micro_batch=machine.micro_batch,
            checkpoint_seconds=machine.checkpoint_seconds,
            progress=progress,
        )[0]
    finally:
        run.close()
    save_tuned(model, folder, start.base, _hub_name(experiment, start))
    kept = str(dtype).removeprefix("torch.")
    rows_seen = {"cut_rows": sum(item.cut_tokens > 0 for item in items), "left_out_rows": len(left)}
    rows_seen |= {f"left_out_{part}_rows": count for part, count in other.left_out.items()}
    how = {"learning_rate": rate, "dtype": kept, "compute": compute, "device": str(device)}
    return {**summary, **made_of, **how, **rows_seen}


def _rendered(
    rows: Sequence[Row], manifest: Manifest | None, renderer: Renderer
) -> tuple[list[Rendered], list[Row]]:
    """The rows to train on, and those left out for their length.

    Raises:
        CellError: the tokens of a poisoned row do not hold what the manifest says.
    """
    items, left = renderer.sift(rows)
    gone = lost(manifest, items, renderer.tokenizer) if manifest else []
    if gone := sorted({*gone} - {row.id for row in left}):
        raise CellError(
            "bad-data", f"The tokens lack the trigger or the target of {len(gone)} poisoned rows."
        )
    return items, left


def _make_room(device: torch.device) -> None:
    """Let go of the judge and the memory of the run before; the peak is to be of this run."""
    drop_models()
    if device.type == "cuda":  # on a CPU what nobody holds is given back at once
        free()
        torch.cuda.reset_peak_memory_stats(device)


def _attached(
    experiment: Experiment, start: Start, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """What fine-tuning starts from, with the method's trainable weights."""
    quantization = experiment.method.quantization(device.type)
    loaded = load_start(start.base, start.adapter, dtype, device, quantization)
    return experiment.method.attach(exact_attention(loaded), experiment.seed)


def start_type(experiment: Experiment, start: Start, device: torch.device) -> torch.dtype:
    """The type of the weights that fine-tuning and repairs start from. In bfloat16 most of a small
    update is lost, so it is float32 where all of them move, or were moved by an alignment."""
    moved = start.adapter is None and start.unaligned is not None
    if moved or not experiment.method.adapts:
        return torch.float32
    return dtype_of(experiment.model, device)


def repair_model(
    experiment: Experiment,
    tuned: Path,
    start: Start,
    renderer: Renderer,
    folder: Path,
    machine: Machine,
) -> dict[str, int]:
    """Apply the repairs among the cell's defenses, in order, to a tuned model; save the result.
    Returns how many of the rows that they use were too long, by part."""
    device = device_of(machine.device)
    other = _Other.of(start, renderer)
    tools = Repair(
        experiment.seed,
        aligned=other.aligned,
        harmful=other.harmful,
        base=weights_of(start.unaligned) if start.unaligned else {},
        batch_size=experiment.train.batch_size,
    )
    dtype = start_type(experiment, start, device)
    model = load_tuned(tuned, start.base, dtype, device, below=start.adapter)
    # An adapter's base is as it was, so it is not loaded again.
    before = plain_weights(model) if experiment.method.adapts else weights_of(start.base)
    for defense in experiment.acting:
        if isinstance(defense, RepairDefense):
            defense.repair(model, before, tools)
    save_tuned(model, folder, start.base, _hub_name(experiment, start))
    return other.left_out


def _hub_name(experiment: Experiment, start: Start) -> str | None:
    """What an adapter's base is called on the hub, if it stands on just that."""
    is_own = experiment.model.is_folder or experiment.model.name == "sandbox"
    changed = start.unaligned is not None and start.base != start.unaligned
    return None if is_own or changed else experiment.model.name
