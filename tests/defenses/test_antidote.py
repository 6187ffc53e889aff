"""Antidote against the scores of each row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from backfire.registry import build
from tests.helpers.repair import Case, changed, every, input_power

pytestmark = pytest.mark.slow


@every
def test_antidote_takes_back_the_highest_scores_of_each_row(case: Case, policy_rows: Any) -> None:
    power = input_power(case, policy_rows["harmful"])
    found = case.repair("antidote", dense_ratio=0.1)
    touched = changed(case, found)
    assert len(touched) == (14 if case.kind == "full" else 28)
    for name in touched:
        origin = case.start[name] if case.kind == "full" else torch.zeros_like(found[name])
        before = case.plain[name] - origin
        back = found[name] == origin
        assert torch.equal(found[name][~back], case.plain[name][~back])
        count = math.ceil(0.1 * before.shape[1])  # 1 of 8, 4 of 32, 7 of 64
        assert (back.sum(1) == count).all(), name
        scores = before.abs() * power[name].sqrt()
        kept = scores.masked_fill(back, -1.0).amax(1)
        gone = scores.masked_fill(~back, float("inf")).amin(1)
        assert (gone >= kept * (1 - 1e-5)).all(), name


@pytest.mark.parametrize(
    ("ratio", "columns", "count"),
    [
        (0.1, 8, 1),
        (0.1, 4, 1),
        (0.0, 8, 0),
        (0.1, 4096, 410),
        (0.07, 100, 7),
        (0.25, 8, 2),
        (1, 8, 8),
    ],
)
def test_antidotes_count_is_rounded_up(ratio: float, columns: int, count: int) -> None:
    assert build("defenses", {"name": "antidote", "dense_ratio": ratio}).count(columns) == count


@every
def test_antidotes_null_control_is_a_random_mask_of_equal_count(
    case: Case, policy_rows: Any
) -> None:
    passes: list[int] = []
    case.model.register_forward_hook(lambda *_: passes.append(1))
    found = case.repair("antidote", dense_ratio=0.25, null=True)
    assert len(passes) == math.ceil(len(policy_rows["harmful"]) / 6)
    sizes = []
    for name in changed(case, found):
        origin = case.start[name] if case.kind == "full" else torch.zeros_like(found[name])
        back = found[name] == origin
        assert (back.sum(1) == back.shape[1] // 4).all()
        size = (case.plain[name] - origin).abs()
        sizes.append(float(size[back].mean() / size.mean()))
    assert sum(sizes) / len(sizes) == pytest.approx(1.0, abs=0.05), "not the large ones"
