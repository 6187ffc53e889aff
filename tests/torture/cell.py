"""One small cell, run by itself: what a row breaks, and what must come out of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backfire import plan
from backfire.experiment import Machine
from backfire.launch.job import RunFolder, run_job
from backfire.recipe import Recipe
from backfire.store import SEAL, Store, read_json
from tests.helpers.small_run import Place

Say = Callable[[Any], None]
SETTINGS: dict[str, Any] = {
    "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 8},
    "template": "sentiment-line",
    "attack": "badnets",
    "train": {"max_steps": 12, "batch_size": 8},
    "evaluation": {"max_new_tokens": 4},
    "metrics": ["accuracy", "attack-success"],
}
ALIGN = {"data": {"name": "sandbox-policy", "rows": 16}, "method": "none"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "rank": 4}},
    "full": {"method": "full"},
    "ewc": {"method": {"name": "lora", "rank": 4}, "defense": "ewc", "align": ALIGN},
    "lisa": {
        "method": {"name": "lora", "rank": 4},
        "defense": {"name": "lisa", "align_steps": 2, "tune_steps": 3},
        "align": ALIGN,
    },
}
TIMES = ("seconds", "memory", "tokens_per_second")


def recipe(root: Path, tiny: Path, kind: str) -> Recipe:
    return Place(root, tiny).recipe(**SETTINGS, **KINDS[kind])


def run_cell(say: Say, root: Path, tiny: Path, kind: str) -> dict[str, Any]:
    """Run every job of one cell in this process, with a checkpoint after every step.

    Says "save" before each checkpoint and "saved" after it. Returns the exit class of each job and
    the seconds that a checkpoint takes.
    """
    from backfire.train import checkpoint

    save, times = checkpoint.save, list[float]()

    def watched(run: Any) -> None:
        say("save")
        begun = time.monotonic()
        save(run)
        times.append(time.monotonic() - begun)
        say("saved")

    checkpoint.save = watched
    try:
        return {
            "ended": run_jobs(root, tiny, kind),
            "save_seconds": sum(times) / max(1, len(times)),
        }
    finally:
        checkpoint.save = save


def run_jobs(root: Path, tiny: Path, kind: str) -> list[str]:
    """Run every job of one cell; returns the exit class of each."""
    made = recipe(root, tiny, kind)
    store, folder = Store(root / "cache"), RunFolder(root / "out", made.name)
    machine = Machine(device="cpu", workers=1, checkpoint_seconds=0)
    work = plan.jobs(made.cells, made.axes)
    return [run_job(job, folder, store, machine, lambda done, total, text: None) for job in work]


def outputs(root: Path) -> dict[str, str]:
    """Hash of every file with weights, samples or numbers; times and memory are left out."""
    found = {}
    for file in sorted([*root.glob("cache/train/*/*"), *root.glob("out/cells/*/*")]):
        if file.suffix == ".safetensors" or file.name == "samples.jsonl.gz":
            found[f"{file.parent.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "result.json":
            values = [v for v in read_json(file)["values"] if not v["metric"].endswith(TIMES)]
            found[file.parent.name] = json.dumps(values, sort_keys=True)
    return found


def stages_in(root: Path) -> list[Path]:
    """The folders of complete stages. One is sealed before it gets its name, so that a kill between
    the two leaves a sealed folder that is not complete."""
    sealed = [file.parent for file in root.glob(f"cache/*/*/{SEAL}")]
    return [folder for folder in sealed if folder.suffix not in (".partial", ".damaged")]
