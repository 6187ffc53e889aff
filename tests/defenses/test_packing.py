"""Training on rows packed end to end is training on padded ones, under every defense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import TrainDefense
from backfire.model.batching import plain
from backfire.model.load import load_base
from backfire.registry import build, find, names
from backfire.train import batches
from backfire.train.loop import TrainingRun
from tests.helpers.fine_tuning import ACTIVE, Make, jolt
from tests.helpers.real_size import DEFENSES
from tests.helpers.training import CPU, Rows, close, gradients, run

pytestmark = pytest.mark.slow

BY_ROW: dict[str, Any] = {"dp": {"name": "dp", "epsilon": None}}


@pytest.fixture(autouse=True)
def _rows_are_packed_whatever_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_WORTH_PACKING", 9.0)


def padded(cell: TrainingRun) -> TrainingRun:
    cell.layout.longest_packed = 0
    return cell


def lines(cell: TrainingRun) -> list[tuple[int, int]]:
    """From now on, the shapes of what the model is run on."""
    seen: list[tuple[int, int]] = []
    table = plain(cell.model).get_input_embeddings()
    table.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_are_those_of_padded_rows(
    method: str, share: bool, make: Make, rows: Rows
) -> None:
    found = []
    for pack in (True, False):
        cell = make(method=method, folder=f"{pack}")
        jolt(cell)
        cell.layout.share, seen = share, lines(cell)
        found.append(gradients(cell if pack else padded(cell), rows["user"][:6]))
        assert all(count == 1 for count, _ in seen) == pack
        if pack:
            useful = sum(len(row.ids) for row in rows["user"][:6])
            assert sum(width for _, width in seen) < useful if share else seen == [(1, useful)]
    (loss, packed), (other, expected) = found
    assert loss == pytest.approx(other, rel=1e-12)
    assert close(packed, expected, 1e-10)


def test_all_training_defenses_are_known() -> None:
    every = {name for name in names("defenses") if issubclass(find("defenses", name), TrainDefense)}
    assert every == {*ACTIVE, *DEFENSES, *BY_ROW}


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("name", [*{**ACTIVE, **DEFENSES, **BY_ROW}])
def test_every_training_defense_sees_the_same(name: str, null: bool, make: Make) -> None:
    pytest.importorskip("opacus") if name == "dp" else None
    settings = {**DEFENSES, **ACTIVE, **BY_ROW}[name]
    settings = {"name": settings} if isinstance(settings, str) else settings
    found, widths = [], []
    for pack in (True, False):
        cell = make({**settings, "null": null}, folder=f"{pack}", max_steps=2)
        jolt(cell)
        seen = lines(cell)
        run(cell if pack else padded(cell))
        widths.append(max(width for _, width in seen))
        found.append((cell.weights(), cell.log[-1]["loss"]))
    alone = name == "dp" or (name, null) == ("vaccine", True)
    assert (widths[0] > widths[1]) != alone, "rows were packed"
    (packed, loss), (expected, other) = found
    assert loss == pytest.approx(other, rel=1e-9)
    assert close(packed, expected, 1e-9)


def test_rows_with_dropout_are_padded(make: Make, tiny: Path) -> None:
    """Packed ones would draw other masks."""
    lora = build("methods", {"name": "lora", "dropout": 0.1})
    assert (
        make(model=lora.attach(load_base(tiny, torch.float32, CPU), 0)).layout.longest_packed == 0
    )
