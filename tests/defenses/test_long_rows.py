"""Models whose rotary angles depend on a row's length run rows of one length at a time, so that
what is read from their layers belongs to the rows of the pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.model.batching import ways
from backfire.model.load import load_base
from backfire.train.repair import Repair
from tests.helpers.fine_tuning import ACTIVE, Make, begun, jolt
from tests.helpers.training import CPU, Rows, close, exact, gradients

LIMIT = 20


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Any:
    """The tiny model with angles that depend on the length of rows with more than 20 tokens."""
    folder = shutil.copytree(tiny, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    config["max_position_embeddings"] = LIMIT
    (folder / "config.json").write_text(json.dumps(config))
    return load_base(folder, torch.float32, CPU)


def test_hidden_states_of_a_step_are_those_of_its_rows(make: Make, model: Any, rows: Rows) -> None:
    cell = begun(make(ACTIVE["ldifs"], model=exact(model).requires_grad_(True)))
    jolt(cell)
    batch = rows["user"][:6]
    assert len({len(row.ids) for row in batch}) > 2
    assert max(len(row.ids) for row in batch) > LIMIT == ways(cell.model).limit
    loss, found = gradients(cell, batch)
    alone, wanted = gradients(cell, batch, 1)
    assert loss == pytest.approx(alone, rel=1e-9)
    assert close(found, wanted)


def test_inputs_of_layers_are_those_of_all_rows(model: Any, rows: Rows) -> None:
    layer, chosen = model.model.layers[1].mlp.up_proj, rows["user"][:6]
    [together] = Repair(0).input_power(model, [layer], chosen)
    tokens = [len(row.ids) for row in chosen]
    each = [Repair(0).input_power(model, [layer], [row])[0] for row in chosen]
    mean = sum(n * power for n, power in zip(tokens, each, strict=True)) / sum(tokens)
    assert together == pytest.approx(mean, rel=1e-5)
