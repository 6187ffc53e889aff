"""Alarms of guards, and the tokens that they replaced."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from backfire.base import Evidence, Sample, Value
from backfire.registry import build


def sample(number: int, subset: str, replaced: float | None) -> Sample:
    return Sample(
        id=str(number),
        subset=subset,  # type: ignore[arg-type]
        prompt="x",
        answer="y",
        reply="y",
        replaced=replaced,
    )


def measured(triggered: Sequence[float | None], clean: Sequence[float | None]) -> dict[str, Value]:
    sets = {
        ("tuned", "triggered", ""): [sample(n, "triggered", x) for n, x in enumerate(triggered)],
        ("tuned", "clean", ""): [sample(n, "clean", x) for n, x in enumerate(clean)],
    }
    evidence = Evidence.of_sets(sets)  # type: ignore[arg-type]
    return {value.metric: value for value in build("metrics", "alarms").values(evidence)}


def test_a_guard_that_stops_replies_has_alarms_only() -> None:
    found = measured([1, 1, 0, 1], [0, 0, 0, 1])
    assert {name: value.value for name, value in found.items()} == {
        "alarms": 0.75,
        "false_alarms": 0.25,
    }


def test_of_replaced_tokens_the_mean_share_is_shown() -> None:
    found = measured([0.5, 0.25, 0, 0.25], [0.1, 0, 0, 0.1])
    assert {name: value.value for name, value in found.items()} == {
        "alarms": 0.75,
        "false_alarms": 0.5,
        "replaced_tokens": 0.25,
        "false_replaced_tokens": pytest.approx(0.05),
    }
    assert {found[name].role for name in found if name != "alarms"} == {"companion"}


def test_without_a_guard_there_is_none() -> None:
    assert measured([None], [None]) == {}
