"""Training that cannot work ends with its own error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.errors import CellError
from backfire.model.load import load_base
from backfire.train import loop
from backfire.train.batches import answer_logits
from backfire.train.loop import TrainingRun
from tests.helpers.loop import losses, new_cell
from tests.helpers.training import CPU, run

pytestmark = pytest.mark.slow


def failure(cell: TrainingRun, **options: Any) -> CellError:
    with pytest.raises(CellError) as caught:
        run(cell, **options)
    return caught.value


def test_a_loss_that_is_no_number_ends_the_run(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    error = failure(new_cell(model, items, tmp_path))
    assert (error.kind, "not finite at step 1" in str(error)) == ("nan", True)


def test_a_rate_that_is_far_too_high_ends_the_run(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    cell = new_cell(model, items, tmp_path, learning_rate=1e30, max_steps=30)
    assert failure(cell).kind == "nan"
    assert cell.step < 30


def test_a_step_without_answers_is_bad_data(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    mute = [Rendered(item.row, item.prompt_ids, item.num_prompt) for item in items]
    error = failure(new_cell(model, mute, tmp_path))
    assert error.kind == "bad-data" and "Step 1 has no supervised token" in str(error)


def test_a_frozen_model_can_not_be_trained(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    with pytest.raises(CellError, match="Nothing to train") as caught:
        new_cell(model.requires_grad_(False), items, tmp_path)
    assert caught.value.kind == "failed"


def test_training_that_changes_nothing_is_a_failure(
    model: Any, items: list[Rendered], tmp_path: Path
) -> None:
    error = failure(new_cell(model, items, tmp_path, learning_rate=1e-30))
    assert error.kind == "failed" and "changed no weight" in str(error)


def test_out_of_memory_halves_the_micro_batch(
    tiny: Path, items: list[Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played by a forward pass that has room for `room` rows only."""
    sizes: list[int] = []

    def small(room: int) -> Callable[..., Tensor]:
        def forward(model: Any, batch: Any) -> Tensor:
            sizes.append(len(batch.places if batch.table is None else batch.table))
            if sizes[-1] > room:
                raise torch.cuda.OutOfMemoryError("no room")
            return answer_logits(model, batch)

        return forward

    monkeypatch.setattr(loop, "answer_logits", small(2))
    cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "a", max_steps=2)
    run(cell)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    plain = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "b", max_steps=2)
    run(plain, micro_batch=2)
    assert losses(cell) == losses(plain)
    monkeypatch.setattr(loop, "answer_logits", small(0))
    cell = new_cell(load_base(tiny, torch.float32, CPU), items, tmp_path / "c")
    assert failure(cell).kind == "oom"
