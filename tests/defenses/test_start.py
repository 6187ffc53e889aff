"""A defense can read the model as it was at the start of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backfire.model.load import load_base
from backfire.train.precision import Precision
from tests.helpers.fine_tuning import Make, jolt
from tests.helpers.training import CPU, Rows, equal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_cell_can_be_evaluated_at_earlier_weights(method: str, make: Make, rows: Rows) -> None:
    cell = make(method=method)
    part, start = rows["user"][:4], cell.weights()
    with torch.no_grad():
        first = cell.logits(part)[0]
    jolt(cell)
    now, addresses = cell.weights(), {n: p.data_ptr() for n, p in cell.trainable.items()}
    cell.model.train()
    held, _ = cell.logits(part)
    with cell.at(start):
        again, _ = cell.logits(part)
        assert not cell.model.training and not again.requires_grad
    assert torch.equal(again, first)
    assert cell.model.training and equal(cell.weights(), now)
    assert {n: p.data_ptr() for n, p in cell.trainable.items()} == addresses
    # What was computed before can still be differentiated, and rightly so.
    held.pow(2).mean().backward()
    found = {n: p.grad.clone() for n, p in cell.trainable.items() if p.grad is not None}
    cell.model.zero_grad()
    cell.logits(part)[0].pow(2).mean().backward()
    assert equal(found, {n: p.grad for n, p in cell.trainable.items() if p.grad is not None})
    with pytest.raises(RuntimeError, match="stop"), cell.at(start):
        raise RuntimeError("stop")
    assert equal(cell.weights(), now), "also when something goes wrong"


def test_the_start_is_not_computed_with_the_copies_that_autocast_keeps(
    tiny: Path, make: Make, rows: Rows
) -> None:
    cell = make(model=load_base(tiny, torch.float32, CPU).requires_grad_(True))
    cell.autocast, part = Precision(CPU, "bfloat16").autocast, rows["user"][:4]
    start = cell.weights()
    with torch.no_grad():
        first = cell.logits(part)[0]
    jolt(cell)
    with cell.autocast():  # as in a step: the tuned model, then the start, in one context
        tuned, _ = cell.logits(part)
        with cell.at(start):
            again, _ = cell.logits(part)
        assert torch.is_autocast_cache_enabled()
    assert tuned.dtype == torch.bfloat16 and not torch.equal(tuned, first)
    assert torch.equal(again, first)
    tuned.float().pow(2).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in cell.trainable.values())
