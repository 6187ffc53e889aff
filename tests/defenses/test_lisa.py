"""Lisa against an independent reference of a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from backfire.train.loop import train
from backfire.train.precision import Precision
from tests.helpers.fine_tuning import (
    LISA,
    Make,
    by_hand,
    is_aligning,
    lisas,
    new_model,
    users,
    weights_after,
)
from tests.helpers.training import CPU, Rows, close, equal, weights

pytestmark = pytest.mark.slow


def test_lisas_alignment_rows_take_the_place_of_the_users(make: Make, rows: Rows) -> None:
    cell = make(LISA, max_steps=12)
    for cell.step in range(12):
        assert cell.rows() == lisas(rows, cell.step), cell.step
    summary = train([cell2 := make(LISA, max_steps=12)], Precision(CPU, "float32"))[0]
    shown = sum(len(lisas(rows, step)) for step in range(12))
    assert cell2.num_steps == 12 and summary["rows"] == shown, "no step more than without"
    seen = [item for step in (0, 1, 5) for item in lisas(rows, step)]
    assert sorted(map(id, seen)) == sorted(map(id, rows["align"])), "a pass leaves no row out"


@pytest.mark.parametrize("align_steps", [2, 0])
def test_lisa_follows_its_formula(align_steps: int, tiny: Path, make: Make, rows: Rows) -> None:
    """States, anchors, the free start and AdamW's moments at once: the whole trajectory."""
    steps, rho = 12, 5.0
    model = new_model(tiny)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    anchor, last, pulls = {"align": start, "tune": start}, [""], list[int]()

    def added(step: int, ours: dict[str, nn.Parameter]) -> Any:
        state = "align" if align_steps and is_aligning(step) else "tune"
        if last[0] and state != last[0]:  # the state that ends leaves its weights behind
            anchor[last[0]] = {n: p.detach().clone() for n, p in ours.items()}
        last[0] = state
        if not step > 0.1 * steps:
            return 0.0
        pulls.append(step)
        other = anchor["tune" if state == "align" else "align"]
        return rho / 2 * sum((p - other[n]).pow(2).sum() for n, p in ours.items())

    batch = (lambda s: lisas(rows, s)) if align_steps else (lambda s: users(rows["user"], s))
    path = by_hand(model, steps, batch, added)
    assert pulls == list(range(2, 12))
    cell = make({**LISA, "align_steps": align_steps}, max_steps=steps)
    guard, seen = cell.hooks[0], list[dict[str, Tensor]]()
    after = guard.after
    guard.after = lambda step: (seen.append(weights(cell.model)), after(step))
    weights_after(cell)
    for step, (found, expected) in enumerate(zip(seen, path, strict=True)):
        moved = {n: found[n] - start[n] for n in found}
        assert close(moved, {n: expected[n] - start[n] for n in found}, 1e-3), step


def test_lisas_anchors_move_at_a_switch_only(make: Make) -> None:
    cell = make(LISA, max_steps=11)
    guard: Any = cell.hooks[0]
    start, after, ends = weights(cell.model), guard.after, dict[str, Any]()

    def watched(step: int) -> None:
        after(step)
        if step % 5 == 1:
            ends["align"] = weights(cell.model)
        if step % 5 == 4:
            ends["tune"] = weights(cell.model)
        for state in ("align", "tune"):
            assert equal(guard.anchors[state], ends.get(state, start)), (step, state)

    guard.after = watched
    weights_after(cell)
    assert len(ends) == 2


def test_lisa_without_a_pull(make: Make) -> None:
    """rho = 0 is the paper's bi-state optimization; so is a start that never ends; and the null
    control ends there too, its anchors always being where the weights are."""
    kinds = [{"rho": 0.0}, {"free_share": 1.0}, {"null": True}, {}]
    ends = [
        weights_after(make({**LISA, **k}, folder=str(i), max_steps=9)) for i, k in enumerate(kinds)
    ]
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2]) and not equal(ends[0], ends[3])


def test_a_pull_draws_the_states_together(make: Make) -> None:
    gaps = []
    for rho in (0.0, 100.0):
        weights_after(cell := make({**LISA, "rho": rho}, folder=str(rho), max_steps=10))
        align, tune = cell.hooks[0].anchors.values()
        gaps.append(sum(float((align[n] - tune[n]).pow(2).sum()) for n in align))
    assert gaps[1] < gaps[0]
