"""RepNoise against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backfire.rng import derive
from backfire.train.loop import TrainingRun
from tests.helpers.alignment import METHODS, REPNOISE, dot, full, new_cell, outputs_of
from tests.helpers.training import close, exact, gradient_of, gradients, loss_of, norm

pytestmark = pytest.mark.slow


def mmd_reference(one: Tensor, two: Tensor) -> Tensor:
    """By its definition, pair by pair."""
    points = [*one.flatten(1), *two.flatten(1)]
    count, size = len(points), len(one)
    squared = [[(p - q).pow(2).sum() for q in points] for p in points]
    mean = sum(float(d.detach()) for line in squared for d in line) / (count * count - count)

    def kernel(i: int, j: int) -> Tensor:
        return sum(torch.exp(-squared[i][j] / (mean * 2.0**k)) for k in (-2, -1, 0, 1, 2))  # type: ignore[return-value]

    first, second = range(size), range(size, count)
    same = sum(kernel(i, j) for i in first for j in first)
    other = sum(kernel(i, j) for i in second for j in second)
    cross = sum(kernel(i, j) for i in first for j in second)
    return (same + other - 2 * cross) / size**2  # type: ignore[return-value]


def repnoise_reference(cell: TrainingRun, alpha: float, beta: float) -> Tensor:
    """Row by row, hidden states as transformers gives them."""
    batch, model = cell.draw(cell.harmful, 0, "repnoise"), cell.model
    inside: Any = (
        model.get_submodule("model") if hasattr(model.model, "layers") else model.model.model
    )
    width = max(len(item.answer_ids) for item in batch)
    losses, tokens, outputs = [], 0, [[] for _ in inside.layers]  # type: ignore[var-annotated]
    for item in batch:
        with outputs_of([layer.mlp for layer in inside.layers]) as seen:
            out = model(input_ids=torch.tensor([item.ids]), output_hidden_states=True)
        answer = torch.tensor(item.answer_ids)
        # The last of transformers' hidden states has been through the norm already.
        lenses = [model.lm_head(inside.norm(h[0])) for h in out.hidden_states[:-1]] + [
            out.logits[0]
        ]
        line = [cross_entropy(x[item.num_prompt - 1 : -1], answer, reduction="sum") for x in lenses]
        losses.append(torch.stack(line))
        tokens += len(answer)
        for layer, (part,) in enumerate(seen):
            padded = torch.zeros(width, part.shape[1], dtype=part.dtype)
            padded[width - len(answer) :] = part[item.num_prompt :]
            outputs[layer].append(padded)
    harm = torch.stack(losses).sum(0).div(tokens).mean()
    generator = torch.Generator().manual_seed(derive(cell.seed, "repnoise noise", 0))
    noise = []
    for layer in outputs:
        found = torch.stack(layer)
        drawn = torch.randn(found.shape, generator=generator).double()
        for place, item in enumerate(batch):
            drawn[place, : width - len(item.answer_ids)] = 0
        noise.append(mmd_reference(found, drawn))
    return beta * torch.stack(noise).mean() - alpha * torch.log(1 + harm)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.7), (0.5, 0.7)])
def test_repnoise_is_its_formula(
    alpha: float, beta: float, method: str, model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    defense = {"name": "repnoise", "alpha": alpha, "beta": beta}
    cell = new_cell(METHODS[method](exact(model)), policy_rows, tmp_path, defense)
    loss, found = gradients(cell)
    aligned, terms = loss_of(cell.model, cell.rows()), repnoise_reference(cell, alpha, beta)
    guard: Any = cell.hooks[0]
    harmful = cell.draw(cell.harmful, 0, "repnoise")
    assert guard.terms(harmful) == pytest.approx(float(terms.detach()), rel=1e-5)
    assert loss == pytest.approx(float(aligned.detach()), rel=1e-6)
    plain, extra = gradient_of(aligned, cell), gradient_of(terms, cell)
    assert norm(extra) > 1e-3 * norm(plain)
    only = {n: found[n] - plain[n] for n in extra}
    assert close(only, extra, 1e-3)


def test_the_discrepancy_is_finite_where_nothing_differs() -> None:
    from backfire.defenses.repnoise import discrepancy

    for one, two in [
        (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)),
        (torch.ones(4, 3, 2), torch.ones(4, 3, 2)),
        (1e4 * torch.randn(4, 3, 2), torch.randn(4, 3, 2)),
    ]:
        point = one.requires_grad_(True)
        value = discrepancy(point, two)
        value.backward()  # type: ignore[no-untyped-call]
        value = value.detach()
        assert value.isfinite() and point.grad is not None and point.grad.isfinite().all()
        # At most 10: all five kernels at 1 within each batch and at 0 across.
        assert -1e-4 <= float(value) <= 10


def test_repnoise_null_control_is_a_random_direction_of_the_same_length(
    model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    exact_model = full(exact(model))
    plain = gradients(new_cell(exact_model, policy_rows, tmp_path))[1]
    real = gradients(new_cell(exact_model, policy_rows, tmp_path, REPNOISE))[1]
    real = {n: real[n] - plain[n] for n in plain}
    cell, along = (
        new_cell(exact_model, policy_rows, tmp_path, {**REPNOISE, "null": True}),
        list[float](),
    )
    for step in range(12):
        cell.gradients.seed = step
        found = gradients(cell)[1]
        found = {n: found[n] - plain[n] for n in plain}
        assert norm(found) == pytest.approx(norm(real), rel=1e-4)
        along.append(dot(found, real) / norm(real) ** 2)
    assert max(map(abs, along)) < 0.1 and abs(sum(along)) / 12 < 0.03, along
