"""Vaccine against its two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.train.loop import TrainingRun
from tests.helpers.alignment import METHODS, VACCINE, full, new_cell, outputs_of
from tests.helpers.training import close, exact, gradient_of, gradients, loss_of, norm

pytestmark = pytest.mark.slow


@contextmanager
def spied(cell: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Tensor]]]:
    """What is added to the attention modules' outputs, pass by pass."""
    guard: Any = cell.hooks[0]
    adding, passes = guard.adding, list[list[Tensor]]()

    def spy(part: Callable[[Tensor], Tensor]) -> Any:
        kept: list[Tensor] = []
        passes.append(kept)

        def look(out: Tensor) -> Tensor:
            found = part(out)
            kept.append(found.detach())
            return found

        return adding(look)

    with monkeypatch.context() as patch:
        patch.setattr(guard, "adding", spy)
        yield passes


def by_row(part: Tensor, batch: Sequence[Rendered]) -> Sequence[Tensor]:
    """Each row's states [token, ...], with its padding; packed rows have none."""
    return part if len(part) == len(batch) else part[0].split([len(item.ids) for item in batch])


def attention_gradient(cell: TrainingRun, batch: Sequence[Rendered]) -> list[list[Tensor]]:
    """For each row, the gradient of the batch's mean loss by each layer's attention output."""
    tokens, layers = sum(len(item.answer_ids) for item in batch), cell.model.model.layers
    found = []
    for item in batch:
        with outputs_of([layer.self_attn for layer in layers]) as outs:
            loss = loss_of(cell.model, [item]) * len(item.answer_ids) / tokens
        found.append([g[0] for g in torch.autograd.grad(loss, [out[0] for out in outs])])
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_vaccine_adds_the_worst_perturbation_of_its_norm(
    packed: bool, model: Any, policy_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = new_cell(full(exact(model)), policy_rows, tmp_path, VACCINE)
    cell.layout.longest_packed *= packed
    batch = cell.rows()
    expected = attention_gradient(cell, batch)
    length = norm([g for layers in expected for g in layers])
    with spied(cell, monkeypatch) as passes:
        gradients(cell)
    first, second = passes
    assert norm(first) == 0 and norm(second) == pytest.approx(0.5, rel=1e-5)
    assert all((len(part) == 1) == packed for part in second)
    for layer, part in enumerate(second):
        for place, item in enumerate(batch):  # rows are padded on the right
            row, size = by_row(part, batch)[place], len(item.ids)
            assert not row[size:].any()
            assert torch.allclose(row[:size], 0.5 * expected[place][layer] / length, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_vaccines_loss_and_gradient_are_those_of_the_second_pass(
    method: str, model: Any, policy_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = new_cell(METHODS[method](exact(model)), policy_rows, tmp_path, VACCINE)
    batch = cell.rows()
    with spied(cell, monkeypatch) as passes:
        loss, found = gradients(cell)
    layers = [m for m in cell.model.modules() if type(m).__name__ == "LlamaAttention"]
    assert len(layers) == len(passes[1]) == 2
    current = [0]

    def hook(number: int) -> Any:
        def add(module: Any, args: Any, out: Any) -> Any:
            added = by_row(passes[1][number], batch)[current[0]]
            return (out[0] + added[: out[0].shape[1]], *out[1:])

        return add

    hooks = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    losses = []
    for place, item in enumerate(batch):
        current[0] = place
        losses.append(loss_of(cell.model, [item]) * len(item.answer_ids))
    for handle in hooks:
        handle.remove()
    expected = torch.stack(losses).sum() / sum(len(item.answer_ids) for item in batch)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert close(found, gradient_of(expected, cell))
    plain = loss_of(cell.model, batch)
    assert loss > float(plain.detach()) + 1e-3, "it is the worse one"
    assert not close(found, gradient_of(plain, cell), 0.01)


def test_vaccines_null_control_has_the_norm_but_no_direction(
    model: Any, policy_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_model, rises = full(exact(model)), list[float]()
    small = {**VACCINE, "rho": 0.1}
    plain, _ = gradients(new_cell(exact_model, policy_rows, tmp_path))
    real, _ = gradients(new_cell(exact_model, policy_rows, tmp_path, small))
    cell = new_cell(exact_model, policy_rows, tmp_path, {**small, "null": True})
    with spied(cell, monkeypatch) as passes:
        for step in range(24):
            cell.gradients.seed = step
            rises.append(gradients(cell)[0] - plain)
    for added in passes[1::2]:
        assert norm(added) == pytest.approx(0.1, rel=1e-5)
    assert abs(sum(rises) / len(rises)) < 0.05 * (real - plain), rises
    assert gradients(cell)[0] - plain == rises[-1], "the same step draws the same"
