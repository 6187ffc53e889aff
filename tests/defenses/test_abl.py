"""ABL against its three phases, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from tests.helpers.fine_tuning import Make, by_hand, new_model, shuffled, users, weights_after
from tests.helpers.training import Rows, close, loss_of, run, weights

pytestmark = pytest.mark.slow

KNOBS = {"name": "abl", "isolate": 0.2, "early": 0.4, "unlearn": 0.3}
EARLY, LAST, STEPS, COUNT = 3, 5, 7, 5
"""0.4, 0.7 and 1 of 7 steps; 0.2 of 24 rows."""


def losses(model: Any, items: list[Rendered]) -> list[float]:
    with torch.no_grad():
        return [float(loss_of(model, [item])) for item in items]


def by_definition(tiny: Path, rows: Rows) -> list[int]:
    """The rows whose loss falls most in the early steps."""
    model = new_model(tiny)
    start = losses(model.eval(), rows["user"])
    by_hand(model, EARLY, lambda step: users(rows["user"], step))
    fallen = [a - b for a, b in zip(start, losses(model, rows["user"]), strict=True)]
    return sorted(sorted(range(24), key=lambda n: -fallen[n])[:COUNT])


def test_the_rows_that_are_learned_fastest_are_isolated(tiny: Path, make: Make, rows: Rows) -> None:
    cell = make(KNOBS)
    hook: Any = cell.hooks[0]
    bad = by_definition(tiny, rows)
    poisoned = [*bad[:2], next(n for n in range(24) if n not in bad)]
    cell.poisoned = frozenset(rows["user"][n].row.id for n in poisoned)
    summary = run(cell)
    assert hook.isolated == bad
    shown = {name: summary[name] for name in ("isolated_rows", "isolated_poisoned_rows")}
    assert shown == {"isolated_rows": COUNT, "isolated_poisoned_rows": 2}


def test_the_phases_are_those_of_the_method(tiny: Path, make: Make, rows: Rows) -> None:
    items, bad = rows["user"], by_definition(tiny, rows)
    isolated = [items[n] for n in bad]
    model = new_model(tiny)
    start, first = losses(model.eval(), items), weights(model)
    bound = {id(item): start[n] for n, item in enumerate(items)}

    def batch(step: int) -> list[Rendered]:
        if step >= LAST:
            turn = step - LAST  # five rows: one batch a pass
            return shuffled(isolated, "abl unlearn", turn)
        here = users(items, step)
        return here if step < EARLY else [item for item in here if item not in isolated]

    def added(step: int, ours: Any) -> Tensor | float:
        if step < LAST:
            return 0.0
        here, total = batch(step), torch.zeros((), dtype=torch.float64)
        tokens = sum(item.num_supervised for item in here)
        for item in here:
            loss = loss_of(model, [item])
            if float(loss.detach()) < bound[id(item)]:
                total = total - loss * item.num_supervised / tokens
        return total - loss_of(model, here)

    path = by_hand(model, STEPS, batch, added)
    end = weights_after(make(KNOBS))
    moved, truth = ({n: w[n] - first[n] for n in first} for w in (end, path[-1]))
    assert close(moved, truth, 1e-3)


def test_an_isolated_row_at_its_first_loss_is_left_alone(make: Make, rows: Rows) -> None:
    cell = make(KNOBS)
    hook: Any = cell.hooks[0]
    hook.isolated, cell.step = [0, 1], LAST
    hook.start = {id(rows["user"][0]): 3.0, id(rows["user"][1]): 1.0}
    labels = torch.tensor([[-100, 5], [6, 7], [-100, 8]])
    token_losses = torch.tensor([[0.0, 2.0], [1.5, 2.5], [0.0, 4.0]])
    mixed = [*rows["user"][:2], rows["align"][0]]
    weighed = hook.weigh(token_losses, labels, mixed, token_losses)
    assert weighed.tolist() == [[0.0, -2.0], [0.0, 0.0], [0.0, 4.0]], "another's row stays"


def test_its_null_control_isolates_as_many_at_random(tiny: Path, make: Make, rows: Rows) -> None:
    cell = make({**KNOBS, "null": True})
    hook: Any = cell.hooks[0]
    weights_after(cell)
    assert len(hook.isolated) == COUNT and hook.isolated != by_definition(tiny, rows)
