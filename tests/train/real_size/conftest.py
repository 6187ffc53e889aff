"""A training run on rows of many lengths, under any method and defense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import Rendered
from backfire.data.render import Renderer
from backfire.experiment import Train
from backfire.model import memory
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train.loop import TrainingRun
from tests.helpers.real_size import rows_of
from tests.helpers.training import CPU


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for what is held in circles takes half a second."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)


@pytest.fixture(scope="session")
def renderer(tiny: Path) -> Renderer:
    return Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)


@pytest.fixture(scope="session")
def items(renderer: Renderer) -> list[Rendered]:
    return renderer.render(rows_of(16))


@pytest.fixture
def new(
    tiny: Path, items: list[Rendered], renderer: Renderer, tmp_path: Path
) -> Callable[..., TrainingRun]:
    harmful = renderer.render(rows_of(7, {"name": "sandbox-policy", "part": "harmful"}))
    aligned = renderer.render(rows_of(11, "sandbox-policy"))
    before = tmp_path / "before"
    model: Any = load_base(tiny, torch.float32, CPU)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, :2] += 0.1
    model.save_pretrained(str(before))

    def make(
        *defenses: Any, method: Any = "full", folder: str = "run", **knobs: Any
    ) -> TrainingRun:
        settings = {"max_steps": 2, "batch_size": 8, "warmup_share": 0, "schedule": "constant"}
        own = {k: knobs.pop(k) for k in ("recompute", "start") if k in knobs}
        (tmp_path / folder).mkdir(exist_ok=True)
        return TrainingRun(
            build("methods", method).attach(load_base(tiny, torch.float32, CPU), 0),
            items,
            Train.make({**settings, **knobs}),
            learning_rate=1e-3,
            seed=3,
            folder=tmp_path / folder,
            name="run",
            defenses=[build("defenses", defense) for defense in defenses],
            aligned=aligned,
            harmful=harmful,
            unaligned=before,
            **own,
        )

    return make
