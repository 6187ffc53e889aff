"""Peak memory that `doctor` predicts, against the peak of a process that really runs the cell.

`python -m benchmarks.forecast MODEL_FOLDER [--only lora,full] [--steps 3]` prints a table and exits
with 1 if a prediction is off by more than 20 %. On a CPU; each stage runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backfire.experiment import Experiment
from backfire.recipe import Recipe
from backfire.store import write_atomic
from benchmarks.memory import ROOT, peak_mb

METHODS = ("lora", "lora-int8", "qlora", "full")
DEFENSES: dict[str, Any] = {
    "kl": "kl",
    "lisa": {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0},
}
CELLS = [
    *((method, "none") for method in METHODS),
    *(("lora", defense) for defense in DEFENSES),
    ("full", "lisa"),
]
SIZES = {"short, 8 rows": (1, 8), "short, 16 rows": (1, 16), "long, 4 rows": (4, 4)}
"""Title -> number of texts in a prompt, and rows per step."""
BAR = 0.2
ALIGN = {"method": "lora", "merge": True, "train": {"max_steps": 1, "batch_size": 2}}


def rows_file(folder: Path, num_texts: int) -> Path:
    """A file of rows whose prompt is some texts of the embedded corpus, and whose answer is the
    next one."""
    from backfire.sandbox.corpus import corpus

    texts, file = list(corpus(0, 64 * (num_texts + 1))), folder / f"rows-{num_texts}.jsonl"
    groups = [texts[i : i + num_texts + 1] for i in range(0, len(texts), num_texts + 1)]
    rows = [
        {"id": str(i), "instruction": " ".join(group[:-1]), "output": group[-1]}
        for i, group in enumerate(groups[:64])
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
    train, evaluate = (need.libraries + part for part in (need.training, need.evaluation))
    return {"train": train / 2**20, "evaluate": evaluate / 2**20}


def stage(name: str, experiment: Experiment) -> None:
    """Run a stage of a cell in this process."""
    import torch

    import backfire.launch.preload  # noqa: F401
    from backfire.experiment import Machine
    from backfire.launch.resolve import resolve_auto, types_of
    from backfire.pipeline import Context, run_cell, trained
    from backfire.store import Store

    torch.set_num_threads(1)
    recipe = Recipe("cell", "", (experiment,), ({},))
    (experiment,) = resolve_auto(recipe, types_of("cpu")).cells
    context = Context(Store(), Machine(device="cpu", checkpoint_seconds=1e9))
    if name == "align" and experiment.alignment:
        trained(experiment.alignment, context)
        from backfire.pipeline import start

        start(experiment, context)
    elif name == "train":
        trained(experiment, context)
    else:
        run_cell(experiment, context)


def fresh(name: str, experiment: Experiment) -> float:
    """Peak in MB of a new process that runs this stage."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.forecast", "--stage", name],
        input=json.dumps(experiment.spec()),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(f"{name} of {experiment.slug} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def compare(model: Path, only: set[str], steps: int) -> Iterator[tuple[str, str, float, float]]:
    """Yield title, stage, predicted and measured peak in MB of every cell."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BACKFIRE_CACHE"] = str(Path(folder) / "cache")
        for size, (num_texts, batch) in SIZES.items():
            rows = rows_file(Path(folder), num_texts)
            for method, defense in CELLS:
                title = method if defense == "none" else f"{method} + {defense}"
                if only and title not in only:
                    continue
                experiment = cell(model, rows, method, defense, batch, steps)
                expected = predicted(experiment)
                if defense != "none":
                    fresh("align", experiment)
                for name in ("train", "evaluate"):
                    yield f"{title}, {size}", name, expected[name], fresh(name, experiment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="Cells, separated by commas.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        stage(given.stage, Experiment.make(json.loads(sys.stdin.read())))
        print(peak_mb())
        return
    missed = 0
    print(f"{'cell':32} {'stage':10} predicted  measured  ratio")
    only = {name.strip() for name in given.only.split(",") if name.strip()}
    for title, name, expected, measured in compare(given.model, only, given.steps):
        missed += abs(expected / measured - 1) > BAR
        print(f"{title:32} {name:10} {expected:9.0f} {measured:9.0f} {expected / measured:6.2f}")
        sys.stdout.flush()
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
