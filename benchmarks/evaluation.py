"""What batches cost in evaluation: rows decoded together, tokens of a pass, prompts end to end or
padded, and what a merged adapter or bfloat16 would save.

    python -m benchmarks.evaluation --base FOLDER

The adapter is random. More rows than a cell has prompts bound what one queue over the prompts of
several cells could gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from backfire.evaluate import budget, inference, prompts
from backfire.evaluate.score import score_rows
from backfire.model.load import load_base
from benchmarks.cells import Cell, make_cell, sandbox_base
from benchmarks.sides import Time

Variant = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and return the median CPU seconds of each variant, by what varies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--base", type=Path, help="folder of the model (default: the embedded one)")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--test-rows", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    base, rows = options.base or sandbox_base(), options.test_rows
    sizes = {"rows": 16, "test_rows": rows, "epochs": 1.0, "max_new_tokens": 32}
    cell = make_cell("sandbox", "lora", base=base, template=options.template, **sizes)
    models = {name: _model(cell, getattr(torch, name)) for name in ("float32", "bfloat16")}
    merged: Any = _model(cell, torch.float32)
    kinds = {**models, "merged": merged.merge_and_unload()}
    model = models["float32"]
    work: dict[str, dict[str, Variant]] = {
        "replies, rows": {f"{n}": _with(cell, model, "replies", n) for n in (16, 32, 64, rows)},
        **{
            f"{what}, {how}, tokens of a pass": {
                f"{n}": _with(cell, model, what, 64, n, how == "packed") for n in (256, 1024, 2048)
            }
            for what in ("scores", "replies")
            for how in ("padded", "packed")
        },
        **{
            f"{what}, model": {name: _with(cell, one, what, 64) for name, one in kinds.items()}
            for what in ("scores", "replies")
        },
    }
    return {title: _compared(title, some, options.repetitions) for title, some in work.items()}


def _model(cell: Cell, dtype: torch.dtype) -> Any:
    """The base with a random adapter."""
    method = cell.experiment.method
    model = method.attach(load_base(cell.base, dtype, torch.device("cpu")), 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.eval()


def _with(
    cell: Cell, model: Any, need: Any, rows: int, tokens: int = 0, packed: bool = True
) -> Variant:
    """Evaluation of the cell's test rows with these limits."""

    def run() -> None:
        kept = budget._PASS_ON_CPU, inference.packed_up_to, prompts.packed_up_to
        budget._PASS_ON_CPU = tokens or kept[0]
        if not packed:
            inference.packed_up_to = prompts.packed_up_to = lambda model: 0
        try:
            score_rows(
                [need],
                model,
                cell.renderer(),
                cell.test,
                max_new_tokens=cell.experiment.evaluation.max_new_tokens,
                batch_size=rows,
                progress=lambda *at: None,
            )
        finally:
            budget._PASS_ON_CPU, inference.packed_up_to, prompts.packed_up_to = kept

    return run


def _compared(title: str, work: Mapping[str, Variant], repetitions: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(repetitions):
        for name in list(work) if number % 2 == 0 else list(work)[::-1]:
            begin = Time.now()
            work[name]()
            times[name].append(Time.now().since(begin).cpu)
    found = {name: round(median(each), 3) for name, each in times.items()}
    print(title, "  ".join(f"{name}: {seconds:.2f} s" for name, seconds in found.items()))
    return found


if __name__ == "__main__":
    main()
