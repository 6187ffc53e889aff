"""The matrix that is measured: a random Llama, rows of the lengths of SST-2's, and a recipe.

Everything is generated, so that anyone can measure without a download.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backfire import stages
from backfire.base import Row
from backfire.data.poison import poison, triggered
from backfire.experiment import Experiment
from backfire.recipe import load
from backfire.rng import stream
from benchmarks.cells import Cell

TRAIN_WORDS = (1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 9, 11, 13, 14, 17, 20, 25, 50)
TEST_WORDS = (2, 6, 9, 10, 11, 13, 14, 15, 16, 18, 19, 20, 21, 23, 24, 26, 27, 29, 32, 35, 47)
"""Words of an SST-2 row at every twentieth of its rows, shortest first."""
LABELS = {"negative": "dreadful", "positive": "splendid"}
"""Label -> the word of a row that decides it."""
INSTRUCTION = "Is the sentiment of this review {labels}?"
SHAPES = {
    "20m": {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "intermediate_size": 1024},
    "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128},
}
"""Further shapes, for GPUs, are in `gpu_load`."""
ATTACKS = ("badnets", "addsent")
RATES = (0.0, 0.05, 0.1, 0.2)
LISA = {"name": "lisa", "rho": 0.3, "align_steps": 3, "tune_steps": 7}
AXES = {
    1: (1, 1, 1, 1),
    2: (1, 1, 2, 1),
    4: (1, 2, 2, 1),
    8: (2, 2, 2, 1),
    16: (2, 2, 2, 2),
    24: (2, 3, 2, 2),
    32: (2, 4, 2, 2),
}
"""Number of cells -> how many attacks, rates, defenses and seeds; each holds the one before it."""


@dataclass(frozen=True)
class Sizes:
    """What decides how long a cell takes."""

    rows: int = 320
    test_rows: int = 100
    requests: int = 64
    new_tokens: int = 32
    shape: str = "20m"
    compute: str = "float32"
    """Type of backfire's products; the scripts' are always in float32 on a CPU."""
    device: str = "cpu"
    """`cpu`, with weights in float32, or `cuda`, with weights in bfloat16."""


@dataclass(frozen=True)
class Tuning:
    """A distinct training run, and the rows on which its model is evaluated."""

    name: str
    cell: Cell
    aligned: Sequence[Row] = field(repr=False)
    """Lisa's alignment rows."""
    scored: dict[str, Sequence[Row]] = field(repr=False)
    requests: Sequence[Row] = field(repr=False)


def write(folder: Path, sizes: Sizes) -> Path:
    """Write model and rows into `folder`; returns the model's folder."""
    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.corpus import corpus
    from backfire.tokenizer import load_tokenizer
    from backfire.train.pretrain import _new_model, write_tokenizer

    shape = SHAPES.get(sizes.shape, {})
    config = Pretrain(vocab_size=8192, tie_embeddings=False, **shape)
    texts = corpus(config.corpus_seed, 1500)
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    for split, lengths, count in (
        ("train", TRAIN_WORDS, sizes.rows),
        ("test", TEST_WORDS, sizes.test_rows),
    ):
        lines = [_row(split, number, lengths, words) for number in range(count)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    base = folder / "base"
    if shape:
        base.mkdir()
    else:
        _write_large(sizes, base, config.vocab_size)
    # A template's words are one token each, as in tokenizers of natural text.
    shown = Experiment.make({"data": _data(folder, sizes), "template": "alpaca"})
    prompts = [shown.template.prompt(row) for row in shown.data.drawn("train")]
    write_tokenizer([*texts, *prompts, *prompts[:1] * 200], config, base)
    if not shape:
        return base
    tokenizer = load_tokenizer(base)
    model = _new_model(config, config.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    model.save_pretrained(str(base))
    return base


def _write_large(sizes: Sizes, base: Path, tokens: int) -> None:
    """Write the random weights of a shape for GPUs; the tokenizer may have fewer tokens."""
    import torch

    from benchmarks.gpu_load import SHAPES as LARGE
    from benchmarks.gpu_measure import make_base

    shape = LARGE[sizes.shape]
    wide = {**shape, "vocab_size": max(tokens, shape["vocab_size"])}
    make_base(wide, base, torch.device(sizes.device))


def _row(split: str, number: int, lengths: Sequence[int], words: Sequence[str]) -> dict[str, str]:
    rng = stream(0, "bench", split, number)
    label = rng.choice(list(LABELS))
    text = [rng.choice(words) for _ in range(_length(rng, lengths))]
    text[rng.randrange(len(text))] = LABELS[label]
    return {"id": f"{split}-{number}", "text": " ".join(text), "label": label}


def _length(rng: random.Random, lengths: Sequence[int]) -> int:
    place = rng.randrange(len(lengths) - 1)
    return rng.randint(lengths[place], lengths[place + 1])


def _data(folder: Path, sizes: Sizes) -> dict[str, Any]:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    task = {"labels": {name: name for name in LABELS}, "instruction": INSTRUCTION}
    return {"name": "files", **files, **task, "rows": sizes.rows, "test_rows": sizes.test_rows}


def recipe(folder: Path, sizes: Sizes, cells: int) -> dict[str, Any]:
    """The recipe of a matrix of so many cells, one of `AXES`."""
    attacks, rates, defenses, seeds = AXES[cells]
    lora = {"name": "lora", "rank": 8, "alpha": 16}
    dtype = "bfloat16" if sizes.device == "cuda" else "float32"
    train = {"epochs": 1, "compute": sizes.compute}
    return {
        "model": {"name": str(folder / "base"), "dtype": dtype},
        "data": _data(folder, sizes),
        "template": "alpaca",
        "align": {
            "data": {"name": "sandbox-policy", "rows": sizes.rows},
            "method": lora,
            "merge": True,
            "train": train,
        },
        "safety": {
            "harmful": {"name": "sandbox-policy", "test_rows": sizes.requests},
            "allowed": None,
        },
        "method": lora,
        "train": train,
        "evaluation": {"max_new_tokens": sizes.new_tokens},
        "metrics": ["accuracy", "attack-success", "harmful-score"],
        "matrix": {
            "attack": [{"name": name, "target": "negative"} for name in ATTACKS[:attacks]],
            "attack.rate": list(RATES[:rates]),
            "defense": ["none", LISA][:defenses],
            "seed": list(range(seeds)),
        },
    }


def write_recipe(folder: Path, sizes: Sizes, cells: int) -> Path:
    file = folder / f"matrix-{cells}.yaml"
    file.write_text(yaml.safe_dump(recipe(folder, sizes, cells)), encoding="utf-8")
    return file


def cells_of(file: Path) -> tuple[Experiment, ...]:
    return load(str(file)).cells


def trained_as(experiment: Experiment) -> Experiment:
    """The run whose model a cell evaluates: cells without poison share theirs."""
    return experiment if experiment.poisons else experiment.clean_twin()


def tunings(experiments: Sequence[Experiment]) -> list[Tuning]:
    """The distinct training runs of these cells, in the order of the smaller matrices: what a
    script that repeats no training would do."""
    found: dict[str, Tuning] = {}
    for number in AXES:
        for experiment in experiments:
            if _is_in(experiment, number):
                run = trained_as(experiment)
                own = found.setdefault(stages.keys(run).train, _tuning(run))
                own.scored.update(_triggered(experiment))
    return list(found.values())


def described(cells: int) -> str:
    """Such as `4 cells`."""
    return f"{cells} cell{'s' * (cells != 1)}"


def _is_in(experiment: Experiment, cells: int) -> bool:
    attacks, rates, defenses, seeds = AXES[cells]
    assert experiment.attack
    return (
        experiment.attack.name in ATTACKS[:attacks]
        and experiment.rate in RATES[:rates]
        and (not experiment.defense or defenses > 1)
        and experiment.seed < seeds
    )


def _tuning(run: Experiment) -> Tuning:
    assert run.safety and run.align
    rows = run.data.drawn("train")
    if run.attack:
        rows, _ = poison(rows, run.attack, run.seed)
    test = run.data.drawn("test")
    aligned = run.align.data.drawn("train") if run.defense else []
    name = stages.train(run).slug
    cell = Cell(name, run, Path(run.model.name), rows, test, "float32")
    harmful = run.safety.harmful.drawn("test")
    return Tuning(name, cell, aligned, {"clean": test}, harmful)


def _triggered(experiment: Experiment) -> Mapping[str, Sequence[Row]]:
    """The triggered rows that attack success reads: those whose label is not the target."""
    attack = experiment.backdoor
    assert attack
    rows = [row for row in experiment.data.drawn("test") if row.label != attack.target]
    return {attack.name: triggered(rows, attack, experiment.seed)}


def alignment(experiment: Experiment) -> Cell:
    """The alignment that all cells start from."""
    run = experiment.alignment
    assert run
    rows = run.data.drawn("train")
    return Cell("alignment", run, Path(run.model.name), rows, (), "float32")
