"""Freezing: what is frozen does not move, and its null control."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backfire.errors import UserError
from backfire.train.loop import TrainingRun
from tests.helpers.fine_tuning import ACTIVE, Make, weights_after
from tests.helpers.training import weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["full", "lora"])
def test_frozen_weights_do_not_change(method: str, make: Make) -> None:
    cell = make(ACTIVE["freeze"], method=method, weight_decay=0.5)
    start, end = weights(cell.model), {}
    end = weights_after(cell)
    for name in cell.trainable:
        assert ".layers.0." not in name and not torch.equal(start[name], end[name]), name
    still = {n for n in start if torch.equal(start[n], end[n])}
    assert still == start.keys() - cell.trainable.keys()
    assert any(".layers.0." in n for n in still) and any(".layers.1." in n for n in cell.trainable)


@pytest.mark.parametrize(
    ("knobs", "frozen"),
    [
        ({"lower_share": 1.0}, [".layers."]),
        ({"lower_share": 0.2}, []),
        ({"lower_share": 0.0, "first_layer": 1}, [".layers.1."]),
        ({"lower_share": 0.0, "last_layer": 0}, [".layers.0."]),
        ({"lower_share": 0.0, "first_layer": 0, "last_layer": 1}, [".layers."]),
        ({"lower_share": 0.0, "which": ["*embed*", "lm_head*"]}, ["embed_tokens", "lm_head"]),
        ({"lower_share": 0.5, "which": ["*.mlp.*"]}, [".layers.0.", ".mlp."]),
    ],
)
def test_exactly_the_chosen_weights_are_frozen(
    knobs: dict[str, Any], frozen: list[str], make: Make
) -> None:
    cell = make({"name": "freeze", **knobs})
    every = dict(cell.model.named_parameters())
    wanted = {name for name in every if any(part in name for part in frozen)}
    assert {name for name, p in every.items() if not p.requires_grad} == wanted
    assert cell.trainable.keys() == every.keys() - wanted


def test_freezing_that_is_impossible_is_refused(make: Make) -> None:
    for knobs, message in (
        (
            {"which": ["*lora*"]},
            r"'\*lora\*'; one of them is named model.embed_tokens.weight",
        ),
        ({"which": ["*"]}, "nothing would be left"),
        ({"first_layer": 2}, "layers 0 to 1"),
        ({"first_layer": 1, "last_layer": 0}, "layers 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            make({"name": "freeze", **knobs})


def test_the_null_control_of_freeze_freezes_as_much_elsewhere(make: Make) -> None:
    def frozen(cell: TrainingRun) -> dict[str, int]:
        every = cell.model.named_parameters()
        return {n: p.numel() for n, p in every if not p.requires_grad}

    true, null = (frozen(make({**ACTIVE["freeze"], "null": n})) for n in (False, True))
    assert null.keys() != true.keys() and null == frozen(make({**ACTIVE["freeze"], "null": True}))
    assert 0.9 * sum(true.values()) < sum(null.values()) <= sum(true.values())
