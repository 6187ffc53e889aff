"""EWC against squared batch gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backfire.registry import build
from tests.helpers.fine_tuning import ACTIVE, Make, begun, jolt, users
from tests.helpers.training import Rows, close, gradient_of, gradients, loss_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ewc_holds_by_squared_batch_gradients(method: str, make: Make, rows: Rows) -> None:
    cell = make(ACTIVE["ewc"], method=method)
    if method == "lora":  # at zero, a fresh adapter's A has no gradient: see the docstring
        jolt(cell)
        cell.hooks = [build("defenses", ACTIVE["ewc"]).hook(cell)]
    start = cell.weights()
    fisher = {n: torch.zeros_like(w) for n, w in start.items()}
    for part in (rows["align"][:6], rows["align"][6:12], rows["align"][12:]):
        for name, gradient in gradient_of(loss_of(cell.model.eval(), part), cell).items():
            fisher[name] += gradient**2
    begun(cell)
    guard: Any = cell.hooks[0]
    assert close(guard.stiffness, fisher)
    assert all(p.grad is None for p in cell.trainable.values())
    assert guard.penalty(0).item() == 0
    jolt(cell)
    penalty = guard.penalty(3)
    gaps = {n: p.detach() - start[n] for n, p in cell.trainable.items()}
    assert penalty.item() == pytest.approx(
        30 * sum((fisher[n] * gaps[n] ** 2).sum() for n in gaps).item(), rel=1e-5
    )
    assert close(gradient_of(penalty, cell), {n: 60 * fisher[n] * gaps[n] for n in gaps})
    batch = users(rows["user"], 0)
    loss, found = gradients(cell, batch)
    plain = gradient_of(loss_of(cell.model, batch), cell)
    assert loss == pytest.approx(loss_of(cell.model, batch).item() + penalty.item(), rel=1e-5)
    assert close(found, {n: plain[n] + 60 * fisher[n] * gaps[n] for n in gaps})


def test_ewc_of_some_rows_and_its_null_control(make: Make, rows: Rows) -> None:
    some: Any = begun(make({**ACTIVE["ewc"], "rows": 4})).hooks[0]
    cell = make()
    one = gradient_of(loss_of(cell.model, rows["align"][:4]), cell)
    assert close(some.stiffness, {n: g**2 for n, g in one.items()})
    true, even = (
        begun(make({**ACTIVE["ewc"], "null": null})).hooks[0].stiffness for null in (False, True)
    )
    total = sum(float(f.sum()) for f in true.values())
    assert sum(float(f.sum()) for f in even.values()) == pytest.approx(total)
    assert len({value for f in even.values() for value in f.unique().tolist()}) == 1
