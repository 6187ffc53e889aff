"""backfire's side: a cell by the same functions as in `backfire run`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backfire.base import Need
from backfire.evaluate.score import score_rows
from backfire.experiment import Machine
from backfire.model.load import load_tuned
from backfire.train.finetune import Start, tune
from benchmarks.cells import Cell
from benchmarks.sides import Steps, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
# No checkpoints, as in the baseline.
MACHINE = Machine(device="cpu", checkpoint_seconds=1e9)


def train(cell: Cell, folder: Path) -> Training:
    """Train on the cell's rows and save the model in `folder`."""
    folder.mkdir(parents=True)
    renderer = cell.renderer()
    steps = Steps()

    def progress(done: int, total: int, text: str) -> None:
        if done:
            steps.mark()

    tune(cell.experiment, cell.train, None, renderer, Start(cell.base), folder, MACHINE, progress)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    return Training(steps.total(), {int(line["step"]): line["loss"] for line in log})


def load(cell: Cell, folder: Path) -> PreTrainedModel:
    """The fine-tuned model in `folder`, or the base if `folder` is the base's."""
    return load_tuned(folder, cell.base, torch.float32, CPU)


def scores(cell: Cell, model: PreTrainedModel) -> list[tuple[float, ...]]:
    """Log-likelihood of every candidate, one tuple per row."""
    return [line["logprobs"] for line in _measure(["scores"], cell, model)]


def replies(cell: Cell, model: PreTrainedModel) -> list[str]:
    """Replies of the model, one text per row."""
    return [line["reply"] for line in _measure(["replies"], cell, model)]


def both(cell: Cell, model: PreTrainedModel) -> tuple[list[tuple[float, ...]], list[str]]:
    """Scores and replies in one pass, as for a cell whose metrics need both."""
    lines = _measure(("scores", "replies"), cell, model)
    return [line["logprobs"] for line in lines], [line["reply"] for line in lines]


def _measure(kinds: Collection[Need], cell: Cell, model: PreTrainedModel) -> list[dict[str, Any]]:
    return score_rows(
        kinds,
        model,
        cell.renderer(),
        cell.test,
        max_new_tokens=cell.experiment.evaluation.max_new_tokens,
        batch_size=MACHINE.eval_batch,
        progress=_quiet,
    )


def _quiet(done: int, total: int, text: str) -> None:
    pass
