"""What holds for every defense."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import DataDefense, RepairDefense, ReplyDefense, TrainDefense
from backfire.model.load import weights_of
from backfire.registry import build, find, names
from backfire.train.repair import Repair
from tests.helpers.fine_tuning import BAD, Make, jolt, plain_rows, weights_after
from tests.helpers.training import Rows, equal, weights

EVERY = names("defenses")
DRAWS_AS_CONTROL: dict[str, dict[str, Any]] = {
    "deduplicate": {},
    "inoculation": {},
    "scan": {"scanner": "near-duplicates"},
}
"""Data defenses that draw only in their null control, with knobs by which they remove copies."""


@pytest.mark.parametrize("name", [n for n in EVERY if issubclass(find("defenses", n), DataDefense)])
@pytest.mark.parametrize("null", [False, True])
def test_a_data_defense_is_deterministic_and_leaves_its_rows(name: str, null: bool) -> None:
    user, aligned = plain_rows(20), plain_rows(30, "aligned ")
    user += [replace(row, id=f"copy of {row.id}") for row in user[:8]]
    before = copy.deepcopy((user, aligned))
    knobs = DRAWS_AS_CONTROL.get(name, {})
    defense = build("defenses", {"name": name, "null": null, **knobs})
    one, two, other = (
        defense.filter(user, aligned, BAD, random.Random(seed)) for seed in (3, 3, 4)
    )
    assert one == two
    assert one != user, "it acts on these rows"
    assert (one != other) == (null or name not in DRAWS_AS_CONTROL)
    assert (user, aligned) == before and one is not user


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in EVERY if issubclass(find("defenses", n), TrainDefense)]
)
@pytest.mark.parametrize("null", [False, True])
def test_a_training_defense_is_deterministic_and_leaves_its_rows(
    name: str,
    null: bool,
    make: Make,
    rows: Rows,
    unaligned: Path,
) -> None:
    before, folder = copy.deepcopy(rows), weights_of(unaligned)
    ends = []
    for turn in ("one", "two"):
        cell = make({"name": name, "null": null}, method="full", folder=turn, max_steps=3)
        random.seed(turn)
        torch.manual_seed(len(ends))  # the global generators must not matter
        ends.append(weights_after(cell))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in cell.model.modules())
    assert equal(*ends)
    assert rows == before and equal(weights_of(unaligned), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in EVERY if issubclass(find("defenses", n), RepairDefense)]
)
@pytest.mark.parametrize("null", [False, True])
def test_a_repair_is_deterministic_and_leaves_its_inputs(
    name: str,
    null: bool,
    make: Make,
    rows: Rows,
    unaligned: Path,
) -> None:
    before, start = copy.deepcopy(rows), weights(make(folder="start").model)
    kept, base = copy.deepcopy(start), weights_of(unaligned)
    ends = []
    for turn in range(2):
        cell = make(folder="tuned")
        jolt(cell)
        model, base_before = cell.model.float().eval(), copy.deepcopy(base)
        torch.manual_seed(turn)
        parts = {"aligned": rows["align"], "harmful": rows["harmful"], "clean": rows["user"]}
        tools = Repair(5, **parts, base=base, batch_size=6)
        build("defenses", {"name": name, "null": null}).repair(model, start, tools)
        ends.append(weights(model))
        assert equal(base, base_before)
    assert equal(*ends)
    assert rows == before and equal(start, kept)


@pytest.mark.parametrize("name", EVERY)
def test_a_defense_names_its_paper_and_its_null_control(name: str) -> None:
    doc = " ".join((find("defenses", name).__doc__ or "").split())
    assert "arXiv:" in doc and "ull control" in doc


@pytest.mark.parametrize("name", EVERY)
def test_a_defense_acts_at_one_stage(name: str) -> None:
    kinds = [
        kind
        for kind in (DataDefense, TrainDefense, RepairDefense, ReplyDefense)
        if issubclass(find("defenses", name), kind)
    ]
    assert len(kinds) == 1


@pytest.mark.parametrize("name", EVERY)
def test_presets_of_a_defense_are_valid_and_name_their_source(name: str) -> None:
    for preset, values in find("defenses", name).presets.items():
        made = build("defenses", {"name": name, "preset": preset})
        assert values.source and all(
            getattr(made, knob) == value for knob, value in values.knobs.items()
        )
