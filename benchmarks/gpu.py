"""Fine-tuning speed of a 7B-shaped model on one GPU: tokens per second, memory and useful MFU of
every fine-tuning method, by backfire's own loop, on random weights and random rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from backfire.errors import UserError, unknown
from benchmarks.gpu_load import NEW_TOKENS, NUM_PROMPTS, SHAPES, Load, peak_flops

RESULTS = Path(__file__).parent / "results"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--shape", default="7b", choices=sorted(SHAPES), help="tiny also runs without a GPU")
    add("--methods", nargs="+", help="methods to measure (default: all that train)")
    add("--length", type=int, default=512, help="tokens of the longest rows")
    add("--answer", type=int, default=128, help="supervised tokens at the end of a row")
    add("--batch", type=int, default=8, help="rows per step")
    add("--steps", type=int, default=10, help="measured steps")
    add("--warm-up", type=int, default=3, help="steps before the measurement")
    add("--compare", action="store_true", help="also run Trainer + PEFT + generate (LoRA methods)")
    add("--base", type=Path, help="folder of the random base (default: temporary)")
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if not 0 < options.answer < options.length:
        parser.error("--answer must be positive and smaller than --length")
    if min(options.batch, options.steps, options.warm_up) < 1:
        parser.error("--batch, --steps and --warm-up must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Run it, print the table, write JSON and Markdown, and return the path of the JSON, or None
    without a GPU."""
    options = arguments(argv)
    import torch

    if options.shape != "tiny" and not torch.cuda.is_available():
        print("There is no GPU here, so nothing is measured; --shape tiny also runs on a CPU.")
        return None

    from backfire.store import slug
    from benchmarks.output import published

    def name(result: Mapping[str, Any]) -> str:
        device = slug(f"{result['when'][:10]}-gpu-{result['environment']['device']}".lower())
        return device if options.shape == "7b" else f"{device}-{options.shape}"

    return published(partial(run, options), markdown, options.out, name)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The content of the JSON file."""
    import torch

    from backfire.launch.environment import environment
    from backfire.model.load import device_of
    from backfire.registry import build, names
    from benchmarks.gpu_measure import make_base, measure

    trainable = [name for name in names("methods") if build("methods", name).trains]
    for name in options.methods or ():
        if name not in trainable:
            raise unknown("fine-tuning method", name, trainable)
        if options.compare and "lora" not in name:
            raise UserError(f"--compare works with LoRA methods, not with {name}.")
    device, when = device_of("auto"), datetime.now(UTC).isoformat(timespec="seconds")
    base = make_base(SHAPES[options.shape], options.base or folder / "base", device)
    load = Load(options.length, options.answer, options.batch, options.warm_up, options.steps)
    measured = []
    for name in options.methods or trainable:
        print(f"{name} ...", file=sys.stderr, flush=True)
        entry = measure(name, base, load, device, folder / name, compare=options.compare)
        measured.append({"method": name, **entry})
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {
        "format": 1,
        "name": "gpu",
        "when": when,
        "environment": {**environment(), "cuda": torch.version.cuda},
        "settings": settings,
        "shape": SHAPES[options.shape],
        "peak_flops": peak_flops(device),
        "methods": measured,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    made, settings = result["environment"], result["settings"]
    peak = result["peak_flops"]
    lines = [
        f"# {settings['shape']} shape on {made['device']}, {result['when'][:10]}",
        "",
        f"Random weights and rows: {settings['batch']} rows of up to {settings['length']} tokens a "
        f"step and at least half as many, which open with the same tokens, a quarter of a whole "
        f"row; {settings['answer']} are supervised; {settings['steps']} steps after "
        f"{settings['warm_up']} to warm up. torch {made['torch']}, transformers "
        f"{made['transformers']}, peft {made['peft']}. Useful FLOPs exclude padding, "
        "recomputation and prompt logits, and count the opening in each row; a token counts 4 per "
        "frozen weight, 6 per trained one. "
        + (f"Peak: {peak / 1e12:,.0f} TFLOP/s." if peak else "The peak of this device is unknown."),
        "",
        "| method | tokens/s | ms a step | passes a step | useful TFLOP/s | useful MFU | "
        "peak memory, GB | estimated, GB | trained, M |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += map(_row, result["methods"])
    if settings["compare"]:
        lines += [
            "",
            "The same work by `Trainer` + PEFT + `generate`, with equal initial weights: training "
            f"as above; three candidates and {NEW_TOKENS} new tokens for each of {NUM_PROMPTS} "
            "prompts.",
            "",
            "| method | training | scoring and replies | peak memory | largest score difference, "
            "nats | equal replies |",
            "|---|---:|---:|---:|---:|---:|",
            *(_compared(entry) for entry in result["methods"] if "baseline" in entry),
        ]
    return "\n".join(lines) + "\n"


def _compared(entry: Mapping[str, Any]) -> str:
    """Ratios of the baseline to backfire."""
    theirs = entry["baseline"]
    cells = (
        entry["method"],
        f"{theirs['seconds_per_step'] / entry['seconds_per_step']:.2f} x",
        f"{entry['baseline_evaluation_seconds'] / entry['evaluation_seconds']:.2f} x",
        f"{entry['peak_memory_mb'] / theirs['peak_memory_mb']:.2f} of the baseline's",
        f"{entry['score_difference']:.1e}",
        f"{entry['equal_replies']:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _row(entry: Mapping[str, Any]) -> str:
    if reason := entry.get("skipped"):
        return f"| {entry['method']} | not measured: {reason} {'| ' * 7}|"
    cells = (
        entry["method"],
        f"{entry['tokens_per_second']:,.0f}",
        f"{entry['seconds_per_step'] * 1e3:,.1f}",
        f"{entry['passes_per_step']:g}",
        f"{entry['useful_flops_per_second'] / 1e12:,.3g}",
        "" if entry["useful_mfu"] is None else f"{entry['useful_mfu']:.1%}",
        f"{entry['peak_memory_mb'] / 1e3:,.2f}",
        f"{entry['estimated_memory_mb'] / 1e3:,.2f}",
        f"{entry['trained_weights'] / 1e6:,.2f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
