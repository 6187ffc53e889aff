"""Small training runs for the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from backfire.base import Rendered, Row
from backfire.data.render import Renderer
from backfire.experiment import Train
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train.loop import TrainingRun
from tests.helpers.training import CPU

RATE = 2e-3


@lru_cache
def reviews(count: int) -> tuple[Row, ...]:
    return tuple(build("datasets", "sandbox-reviews").load("train")[:count])


def rendered(tiny: Path) -> list[Rendered]:
    """Forty rows; the template's opening is long enough to be shared."""
    rows = [Row(r.id, r.instruction, r.input[:40], r.answer) for r in reviews(40)]
    return Renderer(build("templates", "alpaca"), load_tokenizer(tiny), 512).render(rows)


def new_cell(
    model: Any, items: Sequence[Rendered], folder: Path, name: str = "run", **knobs: Any
) -> TrainingRun:
    settings = {"max_steps": 10, "batch_size": 8, "warmup_share": 0.2, **knobs}
    rate = settings.pop("learning_rate", RATE)
    folder.mkdir(exist_ok=True)
    train = Train.make(settings)
    return TrainingRun(model, items, train, learning_rate=rate, seed=5, folder=folder, name=name)


def losses(cell: TrainingRun) -> list[float]:
    return [line["loss"] for line in cell.log]


def lora(model: Any, **knobs: Any) -> Any:
    return build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0)


METHODS: dict[str, Callable[[Any], Any]] = {
    "full": lambda model: model.requires_grad_(True),
    "lora": lora,
    "lora-dropout": lambda model: lora(model, dropout=0.3),
}


def fresh(
    tiny: Path, items: Sequence[Rendered], folder: Path, method: str, **knobs: Any
) -> TrainingRun:
    return new_cell(METHODS[method](load_base(tiny, torch.float32, CPU)), items, folder, **knobs)
