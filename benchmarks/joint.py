"""What training K cells in one pass gains: `python -m benchmarks.joint`.

K LoRA runs of one random base are trained by the package's own loop, each alone, one after another,
and together (`train.together`); the two take turns, step by step. Each cell has its own rows,
adapters and optimizer. The times are of a whole step with its update, in processor seconds, so that
other programs do not lengthen them; on a GPU in seconds of the wall.

`--steps N` is a whole training run of N steps, without loading, checkpoints and log.
`--device cuda` measures on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from backfire.base import Rendered, Row
from backfire.experiment import Train
from backfire.model.fan import fanned, twin
from backfire.model.fused import rounded_once
from backfire.model.load import load_base
from backfire.model.products import fast_products
from backfire.registry import build
from backfire.rng import stream
from backfire.train import steps
from backfire.train.loop import TrainingRun
from backfire.train.packing import same_packs
from backfire.train.precision import Precision, disable_adapter_casts, exact_attention
from backfire.train.together import Together

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4},
    "embedded": {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384,
                 "num_hidden_layers": 4, "num_attention_heads": 4},
    "20m": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
            "num_hidden_layers": 8, "num_attention_heads": 6},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "0.5b": {"vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 4096,
             "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4},
}  # fmt: skip
LENGTHS = (12, 48)
"""Shortest and longest row, as sentences with a short template have."""
PREFIX = 8
"""Tokens that all rows begin with."""


def base_of(shape: str, kind: str, device: str, folder: Path) -> Any:
    """A Llama of random weights, as the package loads it, in the type that `kind` names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = folder / shape
    if not place.is_dir():
        torch.manual_seed(0)
        settings = dict(SHAPES[shape])
        settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
        LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=True)).save_pretrained(place)
    on_gpu = torch.device(device)
    half = torch.bfloat16 if kind == "bfloat16" or device != "cpu" else torch.float32
    bits = build("methods", "qlora").quantization(on_gpu.type) if kind == "nf4" else {}
    return load_base(place, torch.float32 if kind == "float32" else half, on_gpu, bits)


def rows_of(count: int, seed: int) -> list[Rendered]:
    rng = stream(seed, "joint")
    made = []
    for number in range(count):
        ids = [
            *range(4, 4 + PREFIX),
            *(rng.randrange(4, 500) for _ in range(rng.randint(*LENGTHS))),
        ]
        row = Row(f"{number}", "", "", "")
        made.append(Rendered(row=row, ids=ids, num_prompt=len(ids) - 1, cut_tokens=0))
    return made


def runs_of(base: Any, cells: int, rows: int, count: int, compute: str, folder: Path) -> Any:
    """One run for each cell, on models with the weights of this base."""
    models = [twin(base) for _ in range(cells)]
    made = []
    for number, bare in enumerate(models):
        model = build("methods", {"name": "lora", "rank": 8}).attach(exact_attention(bare), number)
        if compute != "float32":
            disable_adapter_casts(model)
        same_packs(model, made[0].model if made else model)
        train = Train.make({"max_steps": count, "batch_size": rows})
        one = TrainingRun(
            model,
            rows_of(rows * count, number),
            train,
            learning_rate=1e-4,
            seed=number,
            folder=folder,
            name="run",
        )
        made.append(one)
    return made


def clock(device: str) -> float:
    """Seconds: of the processor, which other programs do not lengthen; on a GPU, of the wall, when
    all its work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    shape: str, kind: str, cells: int, rows: int, count: int, device: str, folder: Path
) -> dict[str, Any]:
    """Milliseconds per cell and step, alone and together; what is gained, by medians and in the
    whole run; and the largest difference of the last losses."""
    compute = "float32" if kind == "float32" else "bfloat16"
    base, precision = base_of(shape, kind, device, folder), Precision(torch.device(device), compute)  # type: ignore[arg-type]
    sides = [runs_of(base, cells, rows, count, compute, folder) for _ in range(2)]
    times: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for runs in sides:
        for run in runs:
            steps.begin(run, precision)
    for _ in range(count):
        for number, runs in enumerate(sides):
            with ExitStack() as stack:
                together = None
                if number:
                    fan = stack.enter_context(fanned([run.model for run in runs], compute))
                    together = Together(runs, fan, tokens=math.inf)
                for run in runs:
                    if not number:
                        stack.enter_context(rounded_once(run.model, compute))
                    stack.enter_context(fast_products(run.model, compute))
                begin = clock(device)
                if together:
                    found = together.step(runs, {})
                else:
                    found = {run: steps.step(run) for run in runs}
                times[number].append((clock(device) - begin) / cells)
                losses[number] = [float(found[run]) for run in runs]
    alone, joined = (statistics.median(found[1:] or found) for found in times)
    tokens = sum(run.counts["tokens"] for run in sides[0]) / cells / count
    return {
        **{"shape": shape, "kind": kind, "cells": cells, "rows": rows, "steps": count},
        "tokens": round(tokens),
        "alone_ms": round(1000 * alone, 1),
        "together_ms": round(1000 * joined, 1),
        "gain": round(alone / joined, 2),
        "run_gain": round(sum(times[0]) / sum(times[1]), 2),
        "largest_loss_difference": max(abs(x - y) for x, y in zip(*losses, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joint", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["embedded", "20m", "135m", "0.5b"], choices=list(SHAPES))
    add("--kinds", nargs="+", default=["float32", "bfloat16", "nf4"])
    add("--cells", nargs="+", type=int, default=[2, 4, 8])
    add("--rows", nargs="+", type=int, default=[4, 16], help="rows of a step")
    add("--steps", type=int, default=6)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for shape in options.shapes:
            for kind in options.kinds:
                for rows in options.rows:
                    for cells in options.cells:
                        sizes = (shape, kind, cells, rows, options.steps, options.device)
                        found.append(measure(*sizes, Path(folder)))
                        print(json.dumps(found[-1]), flush=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    path = options.out / f"{when[:10]}-joint.json"
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    content = {"when": when, "device": device, "measured": found}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
