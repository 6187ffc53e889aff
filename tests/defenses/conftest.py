"""Rows and training runs that the tests of several defenses share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backfire.base import Rendered, Row
from backfire.data.render import Renderer
from backfire.experiment import Train
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train.loop import TrainingRun
from tests.helpers.fine_tuning import RATE, new_model
from tests.helpers.repair import Case
from tests.helpers.training import CPU, Rows


@pytest.fixture(scope="session")
def rows(tiny: Path) -> Rows:
    """The user's rows, those of the alignment stage, and harmful ones; short, with one opening."""
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)
    sources = {
        "user": build("datasets", "sandbox-reviews").load("train"),
        "align": build("datasets", "sandbox-policy").load("train"),
        "harmful": build("datasets", {"name": "sandbox-policy", "part": "harmful"}).load("train"),
    }
    return {
        part: renderer.render(
            [
                Row(f"{part} {r.id}", "Please answer this.", r.prompt[-20:], r.answer)
                for r in rows[: 24 if part == "user" else 14]
            ]
        )
        for part, rows in sources.items()
    }


@pytest.fixture(scope="session")
def unaligned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model before an alignment that added something of rank 3 to each linear layer."""
    model: Any = load_base(tiny, torch.float32, CPU)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                left = torch.randn(module.out_features, 3, generator=generator)
                module.weight -= (
                    0.05 * left @ torch.randn(3, module.in_features, generator=generator)
                )
    folder = tmp_path_factory.mktemp("models") / "unaligned"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def make(tiny: Path, rows: Rows, unaligned: Path, tmp_path: Path) -> Callable[..., TrainingRun]:
    def cell(
        *defenses: Any, method: str = "full", folder: str = "run", **knobs: Any
    ) -> TrainingRun:
        (tmp_path / folder).mkdir(exist_ok=True)
        model = knobs.pop("model", None)
        settings = {"max_steps": 7, "batch_size": 6, "schedule": "constant", "warmup_share": 0}
        return TrainingRun(
            new_model(tiny, method) if model is None else model,
            knobs.pop("items", rows["user"]),
            Train.make({**settings, **knobs}),
            learning_rate=RATE,
            seed=5,
            folder=tmp_path / folder,
            name="run",
            defenses=[build("defenses", defense) for defense in defenses],
            aligned=rows["align"],
            harmful=rows["harmful"],
            unaligned=unaligned,
        )

    return cell


@pytest.fixture(scope="session")
def policy_rows(tiny: Path) -> dict[str, list[Rendered]]:
    """Rows of the alignment stage and harmful rows."""
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 512)
    return {
        part: renderer.render(
            build("datasets", {"name": "sandbox-policy", "part": part}).load("train")[:20]
        )
        for part in ("align", "harmful")
    }


@pytest.fixture
def case(request: Any, tiny: Path, policy_rows: Any) -> Case:
    return Case(request.param, tiny, policy_rows)
