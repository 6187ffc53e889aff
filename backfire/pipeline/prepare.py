"""Data stages: load, poison, preflight checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Literal

from backfire import stages
from backfire.base import Dataset, Row, needs_of
from backfire.data.jsonl import read_jsonl, write_jsonl
from backfire.data.limits import read_limits
from backfire.data.poison import Manifest, poison
from backfire.data.preflight import preflight, reader_notes
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.experiment import Experiment
from backfire.model.causal import why_not
from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.result import Check
from backfire.store import digest, read_json, write_json
from backfire.tokenizer import Tokenizer, load_tokenizer


def data(experiment: Experiment, context: Context) -> tuple[list[Row], list[Row]]:
    """Training and test rows."""

    def make(folder: Path) -> None:
        spec = experiment.data
        context.progress(0, 1, "rows")
        train, of_train = spec.drawn_with_notes("train")
        test, of_test = spec.drawn_with_notes("test")
        write_jsonl(train, folder / "train.jsonl")
        write_jsonl(test, folder / "test.jsonl")
        write_json(folder / "left_out.json", {"train": of_train, "test": of_test})

    folder = context.store.once(stages.data(experiment), make)
    return _rows(folder / "train.jsonl"), _rows(folder / "test.jsonl")


def _rows(file: Path) -> list[Row]:
    """The rows in a file of a complete stage, which never changes."""
    return list(_read_once(file))


@lru_cache(maxsize=4)
def _read_once(file: Path) -> Sequence[Row]:
    return read_jsonl(file)


def drawn(source: Dataset, split: Literal["train", "test"]) -> list[Row]:
    """The rows of another source than the task's. They are kept from cell to cell, as long as its
    files do not change."""
    key = digest([source.identity(), source.fingerprint(), split])
    if key not in _drawn:
        if len(_drawn) == _MOST_DRAWN:
            _drawn.pop(next(iter(_drawn)))
        _drawn[key] = source.drawn(split)
    return list(_drawn[key])


_drawn: dict[str, list[Row]] = {}
_MOST_DRAWN = 4


def left_out(experiment: Experiment, context: Context) -> dict[str, list[str]]:
    """Split -> sentences about data that was left out of its rows."""
    data(experiment, context)
    file = context.store.path(stages.data(experiment)) / "left_out.json"
    return read_json(file) if file.is_file() else {}


def poisoned(experiment: Experiment, context: Context) -> tuple[list[Row], Manifest | None]:
    """The training rows after the attack, and the poison manifest."""
    train, _ = data(experiment, context)
    if experiment.attack is None or not experiment.poisons:
        return train, None
    attack = experiment.attack

    def make(folder: Path) -> None:
        rows, manifest = poison(train, attack, experiment.seed)
        write_jsonl(rows, folder / "train.jsonl")
        write_json(folder / "manifest.json", manifest.to_json())

    folder = context.store.once(stages.poison(experiment), make)
    return _rows(folder / "train.jsonl"), Manifest.from_json(read_json(folder / "manifest.json"))


def renderer(experiment: Experiment, context: Context) -> Renderer:
    """The renderer of training and evaluation."""
    folder = base(experiment.model, context, weights=False)
    files = sorted(folder.iterdir())
    return Renderer(
        experiment.template,
        _tokenizer(folder, tuple((file.name, file.stat().st_mtime_ns) for file in files)),
        experiment.train.max_length,
        on_long_row=experiment.train.on_long_row,
        limits=read_limits(folder),
    )


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, changed: object) -> Tokenizer:
    """The tokenizer in a folder, loaded anew if one of its files has changed."""
    return load_tokenizer(folder)


def passed_checks(experiment: Experiment, context: Context) -> list[Check]:
    """The preflight checks, if none failed.

    Raises:
        CellError: the first check that failed.
    """
    checks = preflight_checks(experiment, context)
    for check in checks:
        if check.status == "fail":
            raise CellError("bad-data", check.message)
    return checks


def preflight_checks(experiment: Experiment, context: Context) -> list[Check]:
    """The preflight checks of the cell's model and of its training and test rows."""
    if problem := why_not(base(experiment.model, context, weights=False)):
        return [Check("causal", "fail", problem)]

    def make(folder: Path) -> None:
        context.progress(0, 1, "preflight")
        rows, manifest = poisoned(experiment, context)
        _, test = data(experiment, context)
        checks = preflight(
            renderer(experiment, context),
            rows,
            test,
            manifest=manifest,
            attack=experiment.attack,
            seed=experiment.seed,
            reply=_reply(experiment, test),
        )
        checks += reader_notes(left_out(experiment, context))
        write_json(folder / "checks.json", [asdict(check) for check in checks])

    folder = context.store.once(stages.preflight(experiment), make)
    return [Check(**check) for check in read_json(folder / "checks.json")]


def _reply(experiment: Experiment, test: Sequence[Row]) -> int:
    """Number of new tokens after a prompt; 0 if no metric reads replies."""
    labeled = any(row.candidates for row in test)
    metrics = experiment.with_metrics(labeled=labeled).metrics
    reads = "replies" in needs_of(metrics, labeled=labeled)
    return experiment.evaluation.max_new_tokens if reads or experiment.safety else 0
