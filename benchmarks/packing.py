"""What packing saves: `python -m benchmarks.packing` times training steps of the same LoRA runs,
padded and packed, in alternation in one process.

Of each load the ratios of four sides to the first are printed: rows padded, padded behind a shared
prefix, packed, and packed behind it; and `auto`, which chooses one of the last three by counting
tokens. Losses must be equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import torch

from backfire.base import Rendered, Row
from backfire.experiment import Train
from backfire.model.batching import ways
from backfire.model.fused import rounded_once
from backfire.registry import build
from backfire.rng import stream
from backfire.train import batches, steps
from backfire.train.loop import TrainingRun
from backfire.train.precision import Precision, disable_adapter_casts, exact_attention
from benchmarks.gpu_load import SHAPES

SHAPES = SHAPES | {
    "20m": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
    }
}
ANSWER = 3
"""Tokens of an answer, such as a label with its end."""


@dataclass(frozen=True)
class Side:
    """How rows are collated."""

    share: bool
    pack: bool
    worth: float = 9.0
    """Packs are used up to this share of the padded tokens."""


SIDES = {
    "padded": Side(share=False, pack=False),
    "padded, shared prefix": Side(share=True, pack=False),
    "packed": Side(share=False, pack=True),
    "packed, shared prefix": Side(share=True, pack=True),
    "auto": Side(share=True, pack=True, worth=batches._WORTH_PACKING),
}


class Load(NamedTuple):
    """Rows of a prefix, so many more tokens, and an answer."""

    prefix: int
    least: int
    most: int
    batch: int

    def rows(self, vocabulary: int, steps: int) -> list[Rendered]:
        rng = stream(0, "packing")
        prefix = [rng.randrange(4, vocabulary) for _ in range(self.prefix)]
        found = []
        for number in range(self.batch * steps):
            own = [rng.randrange(4, vocabulary) for _ in range(rng.randint(self.least, self.most))]
            answer = [rng.randrange(4, vocabulary) for _ in range(ANSWER)]
            ids = [*prefix, *own]
            found.append(Rendered(Row(str(number), "x"), ids + answer, len(ids)))
        return found


LOADS = {
    "short rows, long template": Load(40, 8, 50, 16),
    "short rows, no template": Load(0, 8, 100, 16),
    "equal rows": Load(0, 61, 61, 16),
    "equal rows, template": Load(40, 21, 21, 16),
    "nearly equal rows": Load(0, 58, 62, 16),
    "long rows, short template": Load(20, 300, 450, 4),
}


def measure(shape: str, compute: str, load: Load, repetitions: int, folder: Path) -> dict[str, Any]:
    """Seconds of processor time a step by side, their ratios, and the largest relative difference
    of the losses."""
    rows = load.rows(SHAPES[shape]["vocab_size"], repetitions + 1)
    with ExitStack() as stack:
        runs = {}
        for name, side in SIDES.items():
            runs[name] = _run(shape, compute, rows, load.batch, folder)
            layout = runs[name].layout
            assert layout.longest_packed and layout.share, layout
            layout.share, layout.longest_packed = side.share, side.pack * layout.longest_packed
            stack.enter_context(rounded_once(runs[name].model, compute))
        seconds, losses = ({name: list[float]() for name in runs} for _ in range(2))
        for turn in range(repetitions + 1):
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                batches._WORTH_PACKING = SIDES[name].worth
                begin = time.process_time()
                losses[name].append(float(steps.step(runs[name])))
                if turn:  # the first one warms up
                    seconds[name].append(time.process_time() - begin)
    medians = {name: median(times) for name, times in seconds.items()}
    first = next(iter(medians))
    pairs = [(a, b) for line in losses.values() for a, b in zip(line, losses[first], strict=True)]
    return {
        "load": load._asdict(),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratios": {name: round(medians[first] / value, 3) for name, value in medians.items()},
        "largest difference of a loss": max(abs(a - b) / abs(b) for a, b in pairs),
    }


def _run(
    shape: str, compute: str, rows: Sequence[Rendered], batch: int, folder: Path
) -> TrainingRun:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = cast(Any, LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)))
    ways(model.eval())
    model = build("methods", "lora").attach(exact_attention(model), 0)
    if compute != "float32":
        disable_adapter_casts(model)
    settings = Train.make({"batch_size": batch, "max_steps": 1000})
    rest: dict[str, Any] = {"seed": 0, "folder": folder, "name": "bench"}
    run = TrainingRun(model, rows, settings, learning_rate=1e-4, **rest)
    run.autocast = Precision(torch.device("cpu"), compute).autocast  # type: ignore[arg-type]
    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--shape", default="20m", choices=SHAPES)
    parser.add_argument("--compute", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="seconds")}
    found |= {key: value for key, value in vars(options).items() if key not in ("out", "loads")}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.loads:
            found[name] = measure(
                options.shape, options.compute, LOADS[name], options.repetitions, Path(folder)
            )
            print(name, json.dumps(found[name]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
