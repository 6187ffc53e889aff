"""What holds for every repair after fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.errors import UserError
from backfire.model.load import load_base
from backfire.registry import build
from backfire.train.repair import Repair
from tests.helpers.repair import Case, changed, every
from tests.helpers.training import CPU

pytestmark = pytest.mark.slow


@every
@pytest.mark.parametrize(
    "spec",
    [
        {"name": "safe-lora", "num_matrices": 0},
        {"name": "safe-lora", "select": "threshold", "threshold": -1},
        {"name": "antidote", "dense_ratio": 0},
        {"name": "task-arithmetic", "alpha": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("null", [False, True])
def test_a_repair_of_strength_zero_changes_nothing(case: Case, spec: Any, null: bool) -> None:
    assert changed(case, case.repair(**spec, null=null)) == set()


# -------------------------------------------------------------------------- what they do not know


@pytest.mark.parametrize("name", ["safe-lora", "antidote"])
@pytest.mark.parametrize("method", [{"name": "ia3"}, {"name": "lora", "dora": True}], ids=str)
def test_other_adapters_are_refused(name: str, method: Any, tiny: Path, policy_rows: Any) -> None:
    model = load_base(tiny, torch.float32, CPU)
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = build("methods", method).attach(model, 0)
    tools = Repair(0, harmful=policy_rows["harmful"], base=begin)
    with pytest.raises(UserError, match="supports full fine-tuning and LoRA without dora"):
        build("defenses", name).repair(model, begin, tools)


def test_missing_inputs_are_refused(tiny: Path, policy_rows: Any) -> None:
    case = Case("full", tiny, policy_rows)
    nothing = Repair(0, base=case.start)
    with pytest.raises(UserError, match="no matrix was changed by both alignment and fine-tuning"):
        build("defenses", "safe-lora").repair(case.model, case.start, nothing)
    with pytest.raises(UserError, match="requires harmful rows"):
        build("defenses", "antidote").repair(case.model, case.start, nothing)
