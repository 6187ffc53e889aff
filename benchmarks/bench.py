"""`make bench`: backfire against `Trainer` + PEFT + `generate` on the same work, and against TRL's
`SFTTrainer` in training if it is installed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="use a tiny random model")
    add("--sandbox-model", type=Path, help="folder of the sandbox's base (default: build it)")
    add("--tweets-train", type=Path, help="airline tweets (CSV, JSONL ...) to train on")
    add("--tweets-test", type=Path, help="airline tweets to evaluate on")
    add("--tweets-model", type=Path, help="folder of the model for the tweets")
    add("--small-model", type=Path, help="folder of the small model (default: from the hub)")
    kinds = ["sandbox", "tweets", "small"]
    add(
        "--cells", nargs="+", default=kinds[:2], choices=kinds, help="small: a real 135M chat model"
    )
    add("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    add(
        "--template",
        help="template of all cells (default: raw, alpaca, chat)",
    )
    add("--rows", type=int, help="training rows (default: 2000, 96 for small)")
    add("--test-rows", type=int, help="test rows (default: 500, 64 for small)")
    add("--epochs", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=32)
    add(
        "--compute",
        default="float32",
        choices=["float32", "bfloat16"],
        help="compute type on both sides",
    )
    add(
        "--baseline-compute",
        choices=["float32", "bfloat16"],
        help="compute type of the scripts, if another one",
    )
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--skip-memory", action="store_true", help="do not measure memory")
    add("--name", default="bench", help="the result is written to <date>-<name>.json")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run it, print the table, write JSON and Markdown, and return the path of the JSON."""
    options = arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from benchmarks.output import dated, published
    from benchmarks.table import markdown

    torch.set_num_threads(options.threads)
    return published(partial(run, options), markdown, options.out, dated(options.name))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The content of the JSON file."""
    from backfire.launch.environment import environment

    before = os.getloadavg()[0]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    work, skipped = bases(options, folder)
    cells = [
        one(options, kind, base, method, folder)
        for kind, base in work.items()
        for method in options.methods
    ]
    # File names only: paths of this machine are private.
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {
        "format": 1,
        "name": options.name,
        "when": when,
        "environment": environment(),
        "load": {"before": before, "after": os.getloadavg()[0]},
        "settings": settings,
        "cells": cells,
        "skipped": skipped,
    }


def bases(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The model folder of each kind of cell, and a sentence for each kind that is skipped."""
    from benchmarks.cells import sandbox_base, small_base, tiny_base

    folders: dict[str, Path] = {}
    skipped: list[str] = []
    tiny = tiny_base(folder / "tiny") if options.tiny else None
    if "sandbox" in options.cells:
        folders["sandbox"] = tiny or options.sandbox_model or sandbox_base()
    if "small" in options.cells:
        folders["small"] = tiny or options.small_model or small_base()
    if "tweets" in options.cells:
        model = tiny or options.tweets_model
        if model and options.tweets_train and options.tweets_test:
            folders["tweets"] = model
        else:
            skipped.append(
                "No tweets cell: give --tweets-train, --tweets-test and --tweets-model "
                "(the tweets may not be redistributed, so they are not shipped)."
            )
    return folders, skipped


def one(
    options: argparse.Namespace, kind: str, base: Path, method: str, folder: Path
) -> dict[str, Any]:
    """Measure one cell."""
    from benchmarks import memory
    from benchmarks.cells import make_cell
    from benchmarks.flops import mfu
    from benchmarks.measure import measure

    cell = make_cell(
        kind,
        method,
        base=base,
        rows=options.rows or (96 if kind == "small" else 2000),
        test_rows=options.test_rows or (64 if kind == "small" else 500),
        epochs=options.epochs,
        max_new_tokens=options.max_new_tokens,
        compute=options.compute,
        baseline_compute=options.baseline_compute,
        template=options.template,
        train=options.tweets_train,
        test=options.tweets_test,
    )
    result = measure(cell, folder / "work", options.repetitions, _say)
    result["mfu"] = mfu(cell, result["medians"]["training loop"])
    result["title"], result["experiment"] = cell.title, _no_folders(cell.experiment.spec())
    result["rows"] = {"train": len(cell.train), "test": len(cell.test)}
    if not options.skip_memory:
        _say(f"{cell.title}: memory")
        result["usage"] = {name: memory.fresh(name, cell) for name in ("baseline", "backfire")}
        tokens = result["tokens"]
        result["usage"]["useful"] = {
            "train": tokens["train"],
            "scores": tokens["test prompts"],
            "replies": tokens["test prompts"],
            "evaluation": tokens["test prompts"],
        }
    return result


def _no_folders(value: Any) -> Any:
    """The same value with absolute paths cut to file names: paths of this machine are private."""
    if isinstance(value, dict):
        return {key: _no_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
