"""DP-SGD against clipping by hand and Opacus' accounting."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backfire.base import Evidence
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Train
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train import steps
from backfire.train.loop import TrainingRun
from tests.helpers.memorization import ROWS, values
from tests.helpers.training import CPU, exact

pytestmark = pytest.mark.slow


@pytest.fixture
def private(tiny: Path, tmp_path: Path) -> Callable[..., TrainingRun]:
    """A cell of the tiny model in float64 under `dp`."""
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 128)

    def make(**knobs: Any) -> TrainingRun:
        model: Any = exact(load_base(tiny, torch.float32, CPU)).requires_grad_(True)
        return TrainingRun(
            model,
            renderer.render(ROWS),
            Train.make({"max_steps": 3, "batch_size": 8}),
            learning_rate=1e-3,
            seed=2,
            folder=tmp_path,
            name="run",
            defenses=[build("defenses", {"name": "dp", **knobs})],
        )

    return make


def step_of(cell: TrainingRun, rows: list[Any]) -> dict[str, torch.Tensor]:
    steps.gradients(cell, rows)
    return {name: p.grad.clone() for name, p in cell.trainable.items() if p.grad is not None}


@pytest.mark.parametrize("null", [False, True])
def test_each_rows_gradient_is_clipped_separately(
    private: Callable[..., TrainingRun], null: bool
) -> None:
    cell = private(epsilon=None, noise_multiplier=0, max_gradient_norm=0.5, null=null)
    rows = list(cell.items[:5])
    total: dict[str, torch.Tensor] = {}
    for row in rows:
        logits = cell.model(input_ids=torch.tensor([row.ids])).logits[0, row.num_prompt - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer_ids))
        parts = torch.autograd.grad(loss, list(cell.trainable.values()))
        norm = math.sqrt(sum(float(part.pow(2).sum()) for part in parts))
        scale = 1 if null else min(1, 0.5 / norm)
        for name, part in zip(cell.trainable, parts, strict=True):
            total[name] = total.get(name, 0) + scale * part / 8
    assert null or norm > 0.5
    found = step_of(cell, rows)
    assert all(torch.allclose(found[name], total[name], rtol=1e-5, atol=1e-9) for name in total)


def test_noise_is_as_large_as_it_should_be(private: Callable[..., TrainingRun]) -> None:
    plain, noisy = (
        private(epsilon=None, noise_multiplier=s, max_gradient_norm=0.5) for s in (0, 3)
    )
    rows = list(plain.items[:2])
    before, after = step_of(plain, rows), step_of(noisy, rows)
    noise = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert float(noise.std()) == pytest.approx(3 * 0.5 / 8, rel=0.02)
    assert abs(float(noise.mean())) < 4 * float(noise.std()) / math.sqrt(len(noise))


def test_rows_are_drawn_independently_and_the_budget_is_opacus(
    private: Callable[..., TrainingRun],
) -> None:
    from opacus.accountants import RDPAccountant

    cell = private(epsilon=None, noise_multiplier=1.1, delta=1e-3, accountant="rdp")
    sizes = [len(cell.hooks[0].rows(step, [])) for step in range(400)]
    assert len(set(sizes)) > 5 and np.mean(sizes) == pytest.approx(8, abs=0.5)
    accountant = RDPAccountant()
    for _ in range(3):
        accountant.step(noise_multiplier=1.1, sample_rate=8 / 40)
    spent = cell.hooks[0].summary()
    assert spent["privacy_epsilon"] == pytest.approx(accountant.get_epsilon(1e-3))
    aimed = private(epsilon=4.0, accountant="rdp")
    assert aimed.hooks[0].summary()["privacy_epsilon"] == pytest.approx(4, abs=0.02)
    assert aimed.hooks[0].summary()["privacy_delta"] == 1 / 40
    assert private(epsilon=4.0, null=True).hooks[0].summary() == {}
    evidence = Evidence(clean=[], training=spent)
    assert values("privacy-epsilon", evidence)["privacy_epsilon"].value == spent["privacy_epsilon"]


def test_a_step_that_draws_no_row_is_noise_alone(private: Callable[..., TrainingRun]) -> None:
    cell = private(epsilon=None, noise_multiplier=0)
    guard: Any = cell.hooks[0]
    guard.rate = 0.0
    rows = guard.rows(0, list(cell.items[:3]))
    assert len(rows) == 1
    guard.rate = 8 / 40
    assert all(float(part.abs().sum()) == 0 for part in step_of(cell, rows).values())


def test_without_opacus_there_is_one_sentence(
    private: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(UserError, match=r"requires Opacus: pip install .*\[dp\]"):
        private(epsilon=4.0)
