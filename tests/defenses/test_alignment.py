"""What holds for every defense of the alignment stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backfire.errors import UserError
from backfire.model.load import load_base
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import Precision
from tests.helpers.alignment import (
    ALIGN,
    BOOSTER,
    METHODS,
    REPNOISE,
    VACCINE,
    after,
    full,
    lora,
    new_cell,
)
from tests.helpers.training import CPU, close, equal, exact, gradients, run

pytestmark = pytest.mark.slow

ZERO = [
    {"name": "vaccine", "rho": 0},
    {"name": "booster", "alpha": 0},
    {"name": "booster", "strength": 0},
    {"name": "repnoise", "alpha": 0, "beta": 0},
]
DROPOUT = {"full": full, "lora": lambda model: lora(model, dropout=0.3)}


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_is_plain_training_bit_for_bit(
    method: str, tiny: Path, policy_rows: Any, tmp_path: Path
) -> None:
    def weights(*defenses: Any) -> dict[str, Tensor]:
        model = DROPOUT[method](load_base(tiny, torch.float32, CPU))
        return after(model, policy_rows, tmp_path / str(len(list(tmp_path.iterdir()))), *defenses)

    plain = weights()
    for zero in ZERO:
        assert equal(weights(zero), plain), zero
    assert not equal(weights(BOOSTER), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_killed_and_resumed_ends_with_equal_weights(
    defense: Any, method: str, tiny: Path, policy_rows: Any, tmp_path: Path
) -> None:
    def kill(done: int, total: int, text: str) -> None:
        if done == 3 and total > 1:
            raise KeyboardInterrupt

    def fresh(folder: str) -> TrainingRun:
        model = DROPOUT[method](load_base(tiny, torch.float32, CPU))
        return new_cell(model, policy_rows, tmp_path / folder, defense)

    whole = fresh("whole")
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(fresh("parts"), checkpoint_seconds=0, progress=kill)
    again, steps = fresh("parts"), list[int]()
    run(again, progress=lambda done, total, text: steps.append(done))
    assert steps[0] == 3 and again.log == whole.log
    assert equal(again.weights(), whole.weights())


@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_how_memory_splits_a_step_changes_nothing(
    defense: Any, model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    cell = new_cell(full(exact(model)), policy_rows, tmp_path, defense)
    (loss, whole), (again, parts) = gradients(cell), gradients(cell, size=4)
    assert again == pytest.approx(loss, rel=1e-6) and close(parts, whole)


@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_a_null_control_costs_the_same(
    defense: Any, model: Any, policy_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward, plain = list[int](), list[int](), TrainingRun.backward
    model.register_forward_hook(lambda *_: forward.append(1))

    def counted(cell: TrainingRun, *args: Any) -> None:
        backward.append(1)
        plain(cell, *args)

    monkeypatch.setattr(TrainingRun, "backward", counted)
    counts = []
    for null in (False, True):
        cell = new_cell(full(model), policy_rows, tmp_path, {**defense, "null": null})
        forward.clear(), backward.clear()  # those that find out what the model supports
        gradients(cell)
        counts.append((len(forward), len(backward)))
    assert counts[0] == counts[1] == ((3, 3) if defense is BOOSTER else (2, 2))


@pytest.mark.parametrize("defense", [BOOSTER, REPNOISE], ids=lambda d: d["name"])
def test_harmful_rows_are_needed(
    defense: Any, model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{defense['name']}' requires harmful rows"):
        new_cell(full(model), policy_rows, tmp_path, defense, harmful=[])


def test_a_model_of_another_make_is_refused(model: Any, policy_rows: Any, tmp_path: Path) -> None:
    del model.model.layers[0].mlp
    with pytest.raises(UserError, match="'repnoise' requires a model with layers"):
        new_cell(full(model), policy_rows, tmp_path, REPNOISE)
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(UserError, match="'vaccine': the model has no attention"):
        new_cell(full(model), policy_rows, tmp_path, VACCINE)


@pytest.mark.parametrize("defense", ALIGN, ids=lambda d: d["name"])
def test_in_bfloat16_they_stay_finite(
    defense: Any, model: Any, policy_rows: Any, tmp_path: Path
) -> None:
    cell = new_cell(full(model), policy_rows, tmp_path, defense)
    train([cell], Precision(CPU, "bfloat16"))
    assert all(math.isfinite(line["gradient_norm"]) for line in cell.log)
    assert all(bool(w.isfinite().all()) for w in cell.weights().values())
