"""Rows: as they are, as the attacker leaves them, and looked at before anything is trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from backfire import plan
from backfire.base import (
    Row,
)
from backfire.data.poison import Manifest, poison
from backfire.data.preflight import VERSION, Check, preflight
from backfire.data.render import Renderer
from backfire.data.rows import read_jsonl, write_jsonl
from backfire.data.tokenizer import load_tokenizer
from backfire.errors import CellError
from backfire.experiment import (
    Experiment,
    digest,
    trigger_identity,
)
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    pass

from backfire.pipeline.bench import Bench
from backfire.pipeline.untuned import base


def data(cell: Experiment, bench: Bench) -> tuple[list[Row], list[Row]]:
    """Training and test rows."""

    def make(folder: Path) -> None:
        spec = cell.data
        bench.progress(0, 1, "rows")
        train = spec.drawn("train")
        test = spec.drawn("test")
        write_jsonl(train, folder / "train.jsonl")
        write_jsonl(test, folder / "test.jsonl")

    folder = bench.store.once("data", cell.data.name, cell.keys.data, make)
    return read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "test.jsonl")


def poisoned(cell: Experiment, bench: Bench) -> tuple[list[Row], Manifest | None]:
    """The training rows as the attacker leaves them, and the manifest of what was done."""
    train, _ = data(cell, bench)
    if cell.attack is None or not cell.poisons:
        return train, None
    attack = cell.attack

    def make(folder: Path) -> None:
        rows, manifest = poison(train, attack, cell.seed)
        write_jsonl(rows, folder / "train.jsonl")
        write_json(folder / "manifest.json", manifest.to_json())

    folder = bench.store.once("poison", plan.poison_slug(cell), cell.keys.poison, make)
    return read_jsonl(folder / "train.jsonl"), Manifest.from_json(
        read_json(folder / "manifest.json")
    )


def renderer(cell: Experiment, bench: Bench) -> Renderer:
    """The one renderer, for training and evaluation."""
    return Renderer(
        cell.template, load_tokenizer(base(cell.model, bench, weights=False)), cell.train.max_length
    )


def checked(cell: Experiment, bench: Bench) -> list[Check]:
    """The preflight checks, none of which failed.

    Raises:
        CellError: the first that failed.
    """
    checks = looked_at(cell, bench)
    for check in checks:
        if check.status == "fail":
            raise CellError("bad-data", check.message)
    return checks


def looked_at(cell: Experiment, bench: Bench) -> list[Check]:
    """The preflight checks of the cell's rows as they will be trained on and evaluated."""
    keys, identity = cell.keys, trigger_identity(cell)
    target = cell.backdoor.target if cell.backdoor else None
    key = digest(
        [
            keys.base,
            keys.poison,
            cell.template.identity(),
            cell.train.max_length,
            identity,
            target,
            VERSION,
        ]
    )

    def make(folder: Path) -> None:
        bench.progress(0, 1, "preflight")
        rows, manifest = poisoned(cell, bench)
        _, test = data(cell, bench)
        checks = preflight(
            renderer(cell, bench), rows, test, manifest=manifest, attack=cell.attack, seed=cell.seed
        )
        write_json(folder / "checks.json", [asdict(check) for check in checks])

    folder = bench.store.once("preflight", plan.poison_slug(cell), key, make)
    return [Check(**check) for check in read_json(folder / "checks.json")]
