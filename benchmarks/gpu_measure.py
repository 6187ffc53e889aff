"""Seconds, memory and useful FLOPs of backfire's training loop with one method on one device."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backfire.base import Rendered
from backfire.commands.estimate import Rows
from backfire.commands.memory import memory, size
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine, Model
from backfire.model.fused import rounded_once
from backfire.model.load import dtype_of, load_base
from backfire.model.products import fast_products
from backfire.model.quantize import parts
from backfire.store import read_json
from backfire.train.loop import TrainingRun, train
from backfire.train.microbatch import peak_memory_mb
from backfire.train.order import steps_of
from backfire.train.precision import (
    Precision,
    compute_type,
    disable_adapter_casts,
    exact_attention,
)
from benchmarks import gpu_compare
from benchmarks.flops import useful_flops
from benchmarks.gpu_load import LEARNING_RATE, Load, peak_flops


def make_base(shape: Mapping[str, int], folder: Path, device: torch.device) -> Path:
    """Save a Llama with random bfloat16 weights once, so that every method loads it like any other
    model; return its folder.

    Raises:
        UserError: the disk has too little space.
    """
    if (folder / "config.json").is_file():
        return folder
    config = LlamaConfig(**dict(shape), max_position_embeddings=4096, rms_norm_eps=1e-5)
    with torch.device("meta"):
        need = 2 * LlamaForCausalLM(config).num_parameters()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 1.1 * need:
        raise UserError(f"The random base needs {need / 1e9:.1f} GB; set --base to a larger disk.")
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    return folder


def measure(
    method: str,
    base: Path,
    load: Load,
    device: torch.device,
    folder: Path,
    *,
    compare: bool = False,
) -> dict[str, Any]:
    """Time, memory and FLOPs of one method, or why it was not measured; with `compare`, also the
    time of scoring and replies, and all of it by the baseline (LoRA methods only)."""
    train_settings: dict[str, Any] = {
        "max_steps": load.warm_up + load.steps,
        "batch_size": load.batch,
        "max_length": load.length,
    }
    dtype = str(dtype_of(Model(name=str(base)), device)).removeprefix("torch.")
    train_settings["compute"] = compute_type("auto", device)
    knobs = {"data": "sandbox-reviews", "method": method, "train": train_settings}
    cell = Experiment.make({**knobs, "model": {"name": str(base), "dtype": dtype}})
    cell = cell.model_copy(update={"method": cell.method.resolved(device.type)})
    shape = size(cell, base)
    rows, kind = load.rows(read_json(base / "config.json")["vocab_size"]), cast(Any, device.type)
    lengths = tuple((len(row.ids), load.answer) for row in rows)
    given = [Rows(len(rows), lengths, load.shared)]
    need = memory(cell, shape, given, kind)
    one = memory(cell, shape, given, kind, Machine(micro_batch=1))
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
        if one.total > has:
            short = f"needs about {one.total / 1e9:.0f} GB of {has / 1e9:.0f} GB with one row"
            return {"skipped": short}
    try:
        timed = _timed(cell, base, rows, load, device, folder, compare=compare)
    except (CellError, torch.cuda.OutOfMemoryError) as error:
        return {"skipped": str(error).partition("\n")[0]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ordered = [row for step in steps_of(rows, cell.train, 0, 0) for row in step]
    run = [(len(row.ids), load.answer) for row in ordered[load.warm_up * load.batch :]]
    seconds = load.steps * timed["seconds_per_step"]
    flops, peak = useful_flops(shape, run, full=method == "full") / seconds, peak_flops(device)
    if compare:
        timed["baseline"] = _baseline(cell, base, ordered, load, device, folder)
    return {
        **timed,
        "knobs": cell.method.spec(),
        "tokens_per_second": sum(tokens for tokens, _ in run) / seconds,
        "useful_flops_per_second": flops,
        "useful_mfu": flops / peak if peak else None,
        "estimated_memory_mb": need.total / 1e6,
        "trained_weights": shape.trainable,
    }


def _timed(
    cell: Experiment,
    base: Path,
    rows: Sequence[Rendered],
    load: Load,
    device: torch.device,
    folder: Path,
    *,
    compare: bool,
) -> dict[str, Any]:
    """Seconds per step after the warm-up, and peak memory, as in `backfire run`."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    dtype, compute = dtype_of(cell.model, device), compute_type("auto", device)
    loaded = load_base(base, dtype, device, cell.method.quantization(device.type))
    model = cell.method.attach(exact_attention(loaded), 0)
    if compute != "float32":
        disable_adapter_casts(model)
    made_of, passes, marks = parts(model), [0], dict[int, tuple[float, int]]()
    model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def mark(step: int, total: int, text: str) -> None:
        if step in (load.warm_up, total):
            if on_gpu:
                torch.cuda.synchronize(device)
            marks[step] = (time.perf_counter(), passes[0])

    folder.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(
        model,
        rows,
        cell.train,
        learning_rate=LEARNING_RATE,
        seed=0,
        folder=folder,
        name="benchmark",
        paged=cell.method.paged() and on_gpu,
    )
    with rounded_once(model, compute), fast_products(model, compute):
        summary = train([run], Precision(device, compute), checkpoint_seconds=1e9, progress=mark)
    (begin, before), (end, after) = marks[load.warm_up], marks[load.warm_up + load.steps]
    evaluated = gpu_compare.evaluation(model, load) if compare else {}
    return {
        **evaluated,
        "seconds_per_step": (end - begin) / load.steps,
        "passes_per_step": (after - before) / load.steps,
        "peak_memory_mb": peak_memory_mb() * 2**20 / 1e6,
        "last_loss": summary[0]["last_loss"],
        "compute": compute,
        "dtypes": made_of["dtypes"],
        "quantized_layers": made_of["quantized_layers"],
    }


def _baseline(
    cell: Experiment,
    base: Path,
    rows: Sequence[Rendered],
    load: Load,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Seconds per step and peak memory of `Trainer` + PEFT."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = gpu_compare.train(cell, base, rows, load, device, folder / "baseline")
    return {"seconds_per_step": seconds, "peak_memory_mb": peak_memory_mb() * 2**20 / 1e6}
