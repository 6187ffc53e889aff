"""Booster against its formula and finite differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.train.loop import TrainingRun
from tests.helpers.alignment import BOOSTER, METHODS, dot, full, moved, new_cell
from tests.helpers.training import close, equal, exact, gradient_of, gradients, loss_of, norm

pytestmark = pytest.mark.slow


def booster_reference(cell: TrainingRun) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The alignment loss, the gradient of the step, and the harmful step."""
    knobs: Any = cell.hooks[0].knobs  # type: ignore[attr-defined]
    aligned = loss_of(cell.model, cell.rows())
    harmful = cell.draw(cell.harmful, 0, "booster")
    plain = gradient_of(aligned, cell)
    here = gradient_of(loss_of(cell.model, harmful), cell)
    step = {n: -knobs.alpha * g / (norm(here) + 1e-7) for n, g in here.items()}
    with moved(cell, step, 1.0):
        there = gradient_of(loss_of(cell.model, harmful), cell)
    total = {n: plain[n] + knobs.strength * (here[n] - there[n]) for n in plain}
    return float(aligned.detach()), total, step


@pytest.mark.parametrize("method", METHODS)
def test_booster_is_its_formula(method: str, model: Any, policy_rows: Any, tmp_path: Path) -> None:
    cell = new_cell(METHODS[method](exact(model)), policy_rows, tmp_path, BOOSTER)
    before = cell.weights()
    loss, found = gradients(cell)
    assert equal(cell.weights(), before), "the harmful step is taken back to the last bit"
    aligned, expected, step = booster_reference(cell)
    assert norm(step) == pytest.approx(0.3, rel=1e-6)
    assert loss == pytest.approx(aligned, rel=1e-6), "not the harmful loss"
    assert close(found, expected)
    assert not close(found, gradient_of(loss_of(cell.model, cell.rows()), cell), 0.01)


def test_booster_by_finite_differences(model: Any, policy_rows: Any, tmp_path: Path) -> None:
    """Its gradient is that of alignment + strength * (harm(w) - harm(w + step)), step held."""
    cell = new_cell(full(exact(model)), policy_rows, tmp_path, BOOSTER)
    _, found = gradients(cell)
    _, _, step = booster_reference(cell)
    batch, harmful = cell.rows(), cell.draw(cell.harmful, 0, "booster")

    @torch.no_grad()
    def objective() -> float:
        here = loss_of(cell.model, harmful)
        with moved(cell, step, 1.0):
            there = loss_of(cell.model, harmful)
        return float(loss_of(cell.model, batch) + 2.0 * (here - there))

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = {n: torch.randn(g.shape, generator=generator).double() for n, g in found.items()}
        direction = {n: d / norm(drawn) + found[n] / norm(found) for n, d in drawn.items()}
        sides = []
        for sign in (1, -1):
            with moved(cell, direction, sign * 1e-4):
                sides.append(objective())
        assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(dot(found, direction), rel=1e-4)


def test_booster_puts_the_weights_back_when_a_pass_fails(
    model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    cell = new_cell(full(model), policy_rows, tmp_path, BOOSTER)
    before, passes = cell.weights(), list[Any]()

    def inner(batch: list[Rendered]) -> Tensor:
        passes.append(cell.weights())
        if len(passes) == 3:
            raise torch.cuda.OutOfMemoryError
        loss_of(cell.model, batch[:2]).backward()
        return torch.zeros(())

    with pytest.raises(torch.cuda.OutOfMemoryError):
        cell.hooks[0].step(cell.rows(), inner)
    assert not equal(passes[2], before) and equal(cell.weights(), before)


def test_boosters_null_control_has_no_systematic_effect(
    model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    """What it adds to the alignment's gradient has no component along what Booster adds."""
    exact_model, added = full(exact(model)), list[dict[str, Tensor]]()
    plain = gradients(new_cell(exact_model, policy_rows, tmp_path))[1]
    real = gradients(new_cell(exact_model, policy_rows, tmp_path, BOOSTER))[1]
    real = {n: real[n] - plain[n] for n in plain}
    cell = new_cell(exact_model, policy_rows, tmp_path, {**BOOSTER, "null": True})
    for step in range(24):
        cell.gradients.seed = step  # the same rows, another direction
        found = gradients(cell)[1]
        added.append({n: found[n] - plain[n] for n in plain})
    along = [dot(a, real) / norm(real) ** 2 for a in added]
    mean = sum(along) / len(along)
    spread = math.sqrt(sum((a - mean) ** 2 for a in along) / len(along))
    assert abs(mean) < 0.05 and abs(mean) < 4 * spread / math.sqrt(len(along)) + 0.02, along
