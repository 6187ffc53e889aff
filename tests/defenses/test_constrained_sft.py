"""Constrained SFT against its token weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from tests.helpers.fine_tuning import LISA, Make, begun, jolt
from tests.helpers.training import Rows, close, gradient_of, gradients, loss_of, losses_alone

pytestmark = pytest.mark.slow


def token_weights(model: Any, start: Any, item: Rendered, floor: float = 1e-3) -> Tensor:
    out = []
    with torch.no_grad():
        now, then = -losses_alone(model, item), -losses_alone(start, item)
    for t, (one, other) in enumerate(zip(now, then, strict=True), 1):
        beta = 0.5 if t == 1 else 2.0 if t <= 5 else 0.1
        out.append(max(2 * (1 - torch.sigmoid(beta * (one - other)).item()), floor))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_constrained_sft_weighs_tokens(method: str, null: bool, make: Make, rows: Rows) -> None:
    long = [
        Rendered(r.row, [*r.ids, *range(20 + i, 20 + 3 * i)], r.num_prompt)
        for i, r in enumerate(rows["user"][:8])
    ]
    cell = begun(make({"name": "constrained-sft", "null": null}, method=method, items=long))
    start = copy.deepcopy(cell.model).eval().requires_grad_(False)
    batch = long[2:8]
    jolt(cell, 0.1)
    cell.model.eval()
    factors = [token_weights(cell.model, start, item) for item in batch]
    assert torch.cat(factors).min() < 0.5 and torch.cat(factors).max() > 1.5
    if null:
        factors = [f.mean().expand_as(f) for f in factors]
    parts = [f * losses_alone(cell.model, item) for f, item in zip(factors, batch, strict=True)]
    expected = torch.cat(parts).mean()
    truth = gradient_of(expected, cell)
    for size in (99, 4):
        loss, found = gradients(cell, batch, size)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert close(found, truth)


def test_constrained_sft_has_a_floor(make: Make, rows: Rows) -> None:
    knobs = {"first_beta": 1000.0, "early_beta": 1000.0, "late_beta": 1000.0, "floor": 0.25}
    cell = begun(make({"name": "constrained-sft", **knobs}))
    jolt(cell, 0.1)
    logits, labels = cell.logits(batch := rows["user"][:6])
    factors = cell.hooks[0].weigh(torch.ones(labels.shape), labels, batch, logits)[labels >= 0]
    assert set(factors.tolist()) <= {0.25, 2.0} and len(factors.unique()) == 2


def test_constrained_sft_leaves_the_rows_of_other_defenses_alone(make: Make, rows: Rows) -> None:
    cell = begun(make("constrained-sft", LISA))
    jolt(cell, 0.1)
    batch = rows["align"][:6]
    assert gradients(cell, batch)[0] == pytest.approx(
        loss_of(cell.model.eval(), batch).item(), rel=1e-5
    )
