"""Several processes train the same model as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backfire.base import Rendered
from backfire.train.ranks import Ranks
from tests.helpers.ranks import new_cell, together, trained
from tests.helpers.training import close

pytestmark = pytest.mark.slow

DEFENSES: dict[str, Any] = {
    "none": (),
    "lisa": ({"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0.0},),
    "booster": ({"name": "booster", "alpha": 0.3, "strength": 2.0},),
    "vaccine": ({"name": "vaccine", "rho": 0.5},),
    "ewc": ({"name": "ewc", "strength": 1e3},),
    "kl and ldifs": ("kl", "ldifs"),
}
CASES = [
    *((method, name) for method in ("lora", "full") for name in DEFENSES),
    ("lora", "repnoise"),
    ("lora", "constrained-sft"),
]


def test_losses_and_weights_are_those_of_one_process(
    tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    def work(ranks: Ranks) -> dict[Any, Any]:
        out = {}
        for method, name in CASES:
            folder = tmp_path / f"{ranks.size}" / f"{method} {name}"
            defenses = DEFENSES.get(name, (name,))
            out[method, name] = trained(new_cell(tiny, items, folder, ranks, method, *defenses))
        return out

    alone = work(Ranks())
    for size in (2, 4):
        found = together(size, tmp_path / f"group {size}", work)
        for case in CASES:
            one, several = alone[case], [rank[case] for rank in found]
            assert all(rank["losses"] == several[0]["losses"] for rank in several), case
            assert several[0]["losses"] == pytest.approx(one["losses"], abs=5e-5), case
            assert several[0]["norms"] == pytest.approx(one["norms"], rel=1e-3), case
            assert close(several[0]["weights"], one["weights"], 1e-3), case
            drift = several[0]["summary"]["drift"]
            assert drift == pytest.approx(one["summary"]["drift"], rel=1e-3), case
            assert several[0]["summary"]["devices"] == size
            assert several[0]["summary"]["sharded"] == (case[0] == "full")
