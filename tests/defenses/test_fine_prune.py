"""Pruning against the Wanda scores of each row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context, data, trained, tuned
from backfire.store import Store
from tests.helpers.repair import Case, changed, every, input_power

pytestmark = pytest.mark.slow


def pruned(case: Case, rows: Any, **knobs: Any) -> dict[str, Any]:
    case.tools = replace(case.tools, clean=rows["align"])
    return case.repair("fine-prune", **knobs)


@every
def test_the_lowest_scores_of_each_row_become_zero(case: Case, policy_rows: Any) -> None:
    power = input_power(case, policy_rows["align"])
    found = pruned(case, policy_rows, ratio=0.25)
    touched = changed(case, found)
    assert len(touched) == (14 if case.kind == "full" else 28)
    for name in touched:
        before, gone = case.plain[name], found[name] == 0
        assert torch.equal(found[name][~gone], before[~gone])
        assert (gone.sum(1) == round(0.25 * before.shape[1])).all(), name
        scores = before.abs() * power[name].sqrt()
        highest = scores.masked_fill(~gone, -1.0).amax(1)
        kept = scores.masked_fill(gone, float("inf")).amin(1)
        assert (highest <= kept * (1 + 1e-5)).all(), name


@every
def test_the_null_control_is_a_random_mask_of_equal_count(case: Case, policy_rows: Any) -> None:
    found, sizes = pruned(case, policy_rows, ratio=0.25, null=True), []
    for name in changed(case, found):
        before, gone = case.plain[name], found[name] == 0
        assert (gone.sum(1) == round(0.25 * before.shape[1])).all()
        sizes.append(float(before.abs()[gone].mean() / before.abs().mean()))
    assert sum(sizes) / len(sizes) == pytest.approx(1.0, abs=0.05), "not the small ones"


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_its_ends(case: Case, policy_rows: Any) -> None:
    assert not changed(case, pruned(case, policy_rows, ratio=0.0))
    case.tools = replace(case.tools, clean=())
    with pytest.raises(UserError, match="requires clean rows"):
        case.repair("fine-prune")


def test_its_rows_are_those_before_the_attack(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backfire.train import finetune

    seen: list[Any] = []
    repair = finetune.repair_model
    monkeypatch.setattr(finetune, "repair_model", lambda *a: seen.append(a[2]) or repair(*a))
    cell = Experiment.make(
        {
            "model": str(tiny),
            "data": {"name": "sandbox-reviews", "rows": 20, "test_rows": 4},
            "attack": {"name": "badnets", "rate": 0.5},
            "defense": {"name": "fine-prune", "rows": 12},
            "train": {"max_steps": 1},
        }
    )
    context = Context(Store(tmp_path), Machine(device="cpu"))
    rows = data(cell, context)[0]
    assert tuned(cell, context) != trained(cell, context)
    (clean,) = (start.clean for start in seen)
    assert len(clean) == 12 and all(row in rows for row in clean)
