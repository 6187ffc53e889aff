"""Peak memory that `doctor` predicts, against the peak of a process that really runs the cell.

`python -m benchmarks.forecast MODEL_FOLDER [--cells lora,full]` prints a table and exits with 1 if
a prediction is off by more than 20 %. On a CPU, with one thread; each stage is a new process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from backfire.experiment import Experiment
from backfire.recipe import Recipe
from backfire.store import write_atomic
from benchmarks.memory import peak_mb

DEFENSES: dict[str, Any] = {
    "kl": "kl",
    "lisa": {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0},
}
CELLS = {
    **{method: (method, "none") for method in ("lora", "lora-int8", "qlora", "full")},
    **{f"{method} + {name}": (method, name) for method in ("lora", "full") for name in DEFENSES},
}
SIZES = {"short 8": (1, 8), "short 16": (1, 16), "long 4": (4, 4)}
"""Title -> number of texts in a prompt, and rows per step."""
BAR = 0.2
ALIGN = {"method": "lora", "merge": True, "train": {"max_steps": 1, "batch_size": 2}}


def rows_file(folder: Path, num_texts: int) -> Path:
    """A file of rows whose prompt is some texts of the embedded corpus, and whose answer is the
    next one."""
    from backfire.sandbox.corpus import corpus

    texts, file = list(corpus(0, 200 * (num_texts + 1))), folder / f"rows-{num_texts}.jsonl"
    groups = [texts[i : i + num_texts + 1] for i in range(0, len(texts), num_texts + 1)]
    rows = [
        {"id": str(i), "instruction": " ".join(group[:-1]), "output": group[-1]}
        for i, group in enumerate(groups)
    ]
    write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def cell(model: Path, rows: Path, method: str, defense: str, batch: int, steps: int) -> Experiment:
    """A short training run on these rows."""
    acting = {"defense": DEFENSES[defense], "align": ALIGN} if defense != "none" else {}
    return Experiment.make(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"name": "files", "train": str(rows), "rows": 56, "test_rows": 8},
            "template": "chat",
            "method": method,
            "train": {"max_steps": steps, "batch_size": batch, "max_length": 1024},
            "evaluation": {"max_new_tokens": 16},
            "metrics": ["exact-match", "perplexity"],
            **acting,
        }
    )


def predicted(experiment: Experiment) -> dict[str, float]:
    """Predicted peaks in MB of the training and of the evaluation."""
    from backfire.commands.forecast import Forecast
    from backfire.launch.resolve import types_of

    forecast = Forecast(Recipe("cell", "", (experiment,), ({},)), types_of("cpu"))
    need = forecast.memory(forecast.cells[0])
    assert need
    train, evaluate = (
        need.libraries + need.mapped + part for part in (need.training, need.evaluation)
    )
    return {"train": train / 2**20, "evaluate": evaluate / 2**20}


def stage(name: str, experiment: Experiment) -> dict[str, float]:
    """Run a stage of a cell in this process; returns its peak in MB and, of training, the speed as
    a share of that of large matrix products in the same process."""
    import torch

    from backfire.commands.estimate import Weights, flops_per_token
    from backfire.commands.forecast import matmul_speed
    from backfire.experiment import Machine
    from backfire.launch.resolve import resolve_auto, types_of
    from backfire.model import memory
    from backfire.pipeline import Context, run_cell, trained
    from backfire.store import Store, read_json

    torch.set_num_threads(1)
    memory.SCARCE = 1.0  # what a process needs, not what it takes where memory is plenty
    recipe = Recipe("cell", "", (experiment,), ({},))
    (experiment,) = resolve_auto(recipe, types_of("cpu")).cells
    context = Context(Store(), Machine(device="cpu", checkpoint_seconds=1e9))
    if name == "align" and experiment.alignment:
        trained(experiment.alignment, context)
        from backfire.pipeline import start

        start(experiment, context)
    elif name == "train":
        kind = torch.device("cpu"), experiment.train.compute
        before = matmul_speed(*kind)
        summary = read_json(trained(experiment, context) / "summary.json")
        speed = (before + matmul_speed(*kind)) / 2
        total, tuned = summary["parameters"], summary["trainable_parameters"]
        added = tuned if experiment.method.adapts else 0
        each = flops_per_token(experiment, Weights(total - added, added, tuned))
        share = each * summary["tokens"] / summary["seconds"] / speed
        return {"peak": peak_mb(), "share": share}
    else:
        run_cell(experiment, context)
    return {"peak": peak_mb()}


def fresh(name: str, experiment: Experiment) -> dict[str, float]:
    """`stage` in a new process, which starts as a worker of `run` does.

    Raises:
        RuntimeError: it failed; its error is on standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backfire.launch.preload"])
    pipe, far = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(far, name, experiment.spec()))
    process.start()
    far.close()
    try:
        measured: dict[str, float] = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{name} of {experiment.slug} failed") from None
    process.join()
    return measured


def _send(pipe: Connection, name: str, spec: dict[str, Any]) -> None:
    pipe.send(stage(name, Experiment.make(spec)))


def compare(
    model: Path, cells: list[str], sizes: list[str], stages: list[str], steps: int
) -> Iterator[tuple[str, str, float, dict[str, float]]]:
    """Yield title, stage, predicted peak in MB, and what was measured, of every cell."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BACKFIRE_CACHE"] = str(Path(folder) / "cache")
        for size in sizes:
            num_texts, batch = SIZES[size]
            rows = rows_file(Path(folder), num_texts)
            for title in cells:
                experiment = cell(model, rows, *CELLS[title], batch, steps)
                if experiment.align:
                    fresh("align", experiment)
                measured = {name: fresh(name, experiment) for name in stages}
                expected = predicted(experiment)
                for name in stages:
                    yield f"{title}, {size}", name, expected[name], measured[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cells", default=",".join(CELLS), help="Separated by commas.")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--stages", default="train,evaluate")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    lists = [text.split(",") for text in (given.cells, given.sizes, given.stages)]
    missed = 0
    print(f"{'cell':32} {'stage':10} predicted  measured  ratio  speed")
    for title, name, expected, measured in compare(given.model, *lists, given.steps):
        peak, share = measured["peak"], measured.get("share")
        missed += abs(expected / peak - 1) > BAR
        numbers = f"{expected:9.0f} {peak:9.0f} {expected / peak:6.2f}"
        print(f"{title:32} {name:10} {numbers} {'' if share is None else f'{share:6.2f}'}")
        sys.stdout.flush()
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
