"""`evaluation.merged`: adapters merged for the evaluation, where that changes only rounding."""

from __future__ import annotations

from typing import Any

import pytest

from backfire import stages
from backfire.errors import UserError
from backfire.experiment import Experiment

MERGED = {"evaluation": {"merged": True}}


def cell(**settings: Any) -> Experiment:
    return Experiment.make({"data": "sandbox-reviews", "method": "lora", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "llama-adapter"}, "method 'llama-adapter' cannot be merged"),
        ({"method": "qlora"}, "method 'qlora' quantizes the base"),
        ({"metrics": ["parity"]}, "as trained with its form merged"),
    ],
)
def test_what_merging_would_change_is_refused(settings: dict[str, Any], message: str) -> None:
    cell(**settings)
    with pytest.raises(UserError, match=message):
        cell(**settings, **MERGED)


def test_the_setting_enters_the_keys_of_evaluation_alone() -> None:
    plain, merged = cell(), cell(**MERGED)
    assert stages.keys(plain).tuned == stages.keys(merged).tuned
    assert stages.cell_key(plain) != stages.cell_key(merged)
    assert stages.cell_key(plain) == stages.cell_key(cell(evaluation={"merged": False}))
    both = [stages.evaluation(one, "rows", ["scores"]).key for one in (plain, merged)]
    assert both[0] != both[1]
