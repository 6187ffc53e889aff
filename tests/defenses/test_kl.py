"""KL regularization against the divergence of the next token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from tests.helpers.fine_tuning import ACTIVE, Make, begun, jolt
from tests.helpers.training import Rows, close, gradient_of, gradients, logits_alone, loss_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("direction", ["tuned-start", "start-tuned"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_kl_is_the_divergence_of_the_next_token(
    method: str, direction: str, make: Make, rows: Rows
) -> None:
    cell = begun(make({**ACTIVE["kl"], "direction": direction}, method=method))
    start = copy.deepcopy(cell.model).eval().requires_grad_(False)
    batch = [*rows["user"][:3], *rows["align"][:3]]

    def divergence() -> Tensor:
        parts = []
        for item in batch:
            p, q = (log_softmax(logits_alone(m, item), -1) for m in (cell.model, start))
            p, q = (p, q) if direction == "tuned-start" else (q, p)
            parts.append((p.exp() * (p - q)).sum(1))
        return torch.cat(parts).mean()

    assert divergence().item() == 0
    assert gradients(cell, batch)[0] == pytest.approx(loss_of(cell.model, batch).item(), rel=1e-5)
    jolt(cell)
    cell.model.eval()
    expected = loss_of(cell.model, batch) + 2.0 * divergence()
    assert divergence() > 1e-3
    truth = gradient_of(expected, cell)
    for size in (99, 4):
        loss, found = gradients(cell, batch, size)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert close(found, truth)
    # And by finite differences, of the penalty alone.
    plain = gradient_of(loss_of(cell.model, batch), cell)
    slope = {n: found[n] - plain[n] for n in found}
    values, step = [], 1e-4
    for scale in (step, -2 * step):
        with torch.no_grad():
            for n, p in cell.trainable.items():
                p.add_(scale * slope[n])
            values.append(2.0 * divergence().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(
        sum(float(g.pow(2).sum()) for g in slope.values()), rel=1e-3
    )
