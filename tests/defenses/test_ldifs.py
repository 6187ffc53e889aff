"""LDIFS against the distance of hidden states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.errors import UserError
from backfire.registry import build
from backfire.train.batches import collate
from tests.helpers.fine_tuning import ACTIVE, Make, begun, jolt
from tests.helpers.training import Rows, close, gradient_of, gradients, loss_of

pytestmark = pytest.mark.slow


def mlp_outputs(model: Any, item: Rendered) -> list[Tensor]:
    """[token, width] of each layer, where the answer's tokens are predicted; the row alone."""
    out: list[Tensor] = []
    layers = [m for n, m in model.named_modules() if n.endswith(".mlp")]
    handles = [m.register_forward_hook(lambda m, a, o: out.append(o)) for m in layers]
    model(input_ids=torch.tensor([item.ids]))
    for handle in handles:
        handle.remove()
    return [o[0, item.num_prompt - 1 : -1] for o in out]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ldifs_is_the_distance_of_hidden_states(method: str, make: Make, rows: Rows) -> None:
    cell = begun(make(ACTIVE["ldifs"], method=method))
    start = copy.deepcopy(cell.model).eval().requires_grad_(False)
    batch = [*rows["user"][:3], *rows["align"][:3]]
    assert len(collate(batch).prefix) >= 8, "a common opening is run once"
    assert len({len(item.answer_ids) for item in batch}) > 1
    jolt(cell)
    cell.model.eval()
    distances = []
    for item in batch:
        pairs = zip(mlp_outputs(cell.model, item), mlp_outputs(start, item), strict=True)
        distances.append(sum((a - b).pow(2).sum(1) for a, b in pairs))
    assert len(mlp_outputs(start, batch[0])) == 2
    expected = loss_of(cell.model, batch) + 2.0 / 2 * torch.cat(distances).mean()
    assert torch.cat(distances).min() > 1e-6
    truth = gradient_of(expected, cell)
    for size in (99, 4, 1):
        loss, found = gradients(cell, batch, size)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert close(found, truth)
    assert not any(m._forward_hooks for m in cell.model.modules()), "no hook is left behind"


def test_ldifs_requires_a_model_with_mlps(make: Make) -> None:
    cell = make()
    for layer in cell.model.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    with pytest.raises(UserError, match="modules named 'mlp'"):
        build("defenses", "ldifs").hook(cell)
