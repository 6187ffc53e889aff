"""Influence of training rows on a reply, against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backfire.base import Rendered, Row
from backfire.evaluate.influence import hits, influence, random_hits, row_gradients
from backfire.model.load import load_base
from backfire.train.batches import answer_logits, collate, token_losses

ROWS = [torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0], [0.0], [-1.0]])]
REPLY = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])]
SIZES = [2, 1]


def test_datainf_agrees_with_its_formula_by_hand() -> None:
    # First weight: |g|^2 = 1, 4, 2; lambda = (7 / 3) / 2 / 10 = 7 / 60. <v, g> = 1, 2, 2.
    first = 7 / 60
    c = [1 / (first + 1), 2 / (first + 4), 2 / (first + 2)]
    h = [(1 - (c[0] + c[2]) / 3) / first, (1 - (2 * c[1] + c[2]) / 3) / first]
    # Second: |g|^2 = 4, 0, 1; lambda = (5 / 3) / 10 = 1 / 6. <v, g> = 2, 0, -1.
    second = 1 / 6
    d = [2 / (second + 4), 0.0, -1 / (second + 1)]
    k = (1 - (2 * d[0] - d[2]) / 3) / second
    wanted = [h[0] + 2 * k, 2 * h[1], h[0] + h[1] - k]
    assert influence(ROWS, REPLY, SIZES, "datainf")[0].tolist() == pytest.approx(wanted, rel=1e-4)


def test_product_and_cosine_by_hand() -> None:
    assert influence(ROWS, REPLY, SIZES, "product").tolist() == [[3, 2, 1]]
    wanted = [3 / (5 * 3) ** 0.5, 2 / (4 * 3) ** 0.5, 1 / (3 * 3) ** 0.5]
    assert influence(ROWS, REPLY, SIZES, "cosine")[0].tolist() == pytest.approx(wanted)


def test_rows_without_gradients_score_zero() -> None:
    nothing = [torch.zeros_like(part) for part in ROWS]
    for method in ("datainf", "product", "cosine"):
        assert influence(nothing, REPLY, SIZES, method).tolist() == [[0, 0, 0]]


def test_hits_count_the_best_k() -> None:
    assert hits(torch.tensor([0.1, 3.0, 2.0, -1.0]), [False, True, False, True]) == 1
    assert hits(torch.tensor([0.1, 3.0, 2.0, -1.0]), [False, True, True, False]) == 2


def test_random_directions_find_no_more_than_chance() -> None:
    rows = [torch.randn(400, 30, generator=torch.Generator().manual_seed(1))]
    found = random_hits(rows, [place < 40 for place in range(400)], [30], "product", draws=100)
    assert 3 < found < 5  # 40 of 400 rows: 4 by chance


@pytest.fixture
def items() -> list[Rendered]:
    ids = [[5, 6, 7, 8, 9], [5, 9, 30, 31], [40, 41, 42, 43, 44, 45]]
    return [Rendered(Row(str(n), ""), line, 2) for n, line in enumerate(ids)]


def test_gradients_of_rows_are_those_of_each_row_alone(tiny: Path, items: list[Rendered]) -> None:
    model = load_base(tiny, torch.float32, torch.device("cpu"))
    names = [n for n, _ in model.named_parameters() if "layers.1.mlp.up_proj" in n or "norm" in n]
    weights = {n: p for n, p in model.named_parameters() if n in names}
    found = row_gradients(model, weights, items)
    for place, item in enumerate(items):
        model.zero_grad()
        batch = collate([item], share=False)
        token_losses(answer_logits(model, batch), batch.labels).mean().backward()
        for own, weight in zip(found, weights.values(), strict=True):
            torch.testing.assert_close(own[place], weight.grad.flatten())


def test_projected_gradients_keep_products(tiny: Path, items: list[Rendered]) -> None:
    model = load_base(tiny, torch.float32, torch.device("cpu"))
    weights = {n: p for n, p in model.named_parameters() if "mlp" in n}  # 2,048 numbers each
    whole = row_gradients(model, weights, items)
    small = row_gradients(model, weights, items, room=len(items) * len(weights) * 4 * 1024)
    assert {part.shape[1] for part in whole} == {2048}
    assert {part.shape[1] for part in small} == {1024}
    exact, near = (torch.stack([p @ p.T for p in parts]).sum(0) for parts in (whole, small))
    scale = exact.diagonal().sqrt()
    assert ((near - exact) / scale / scale[:, None]).abs().max() < 0.1
    again = row_gradients(model, weights, items, room=len(items) * len(weights) * 4 * 1024)
    assert all(torch.equal(a, b) for a, b in zip(small, again, strict=True))
