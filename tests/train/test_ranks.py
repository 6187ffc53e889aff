"""Several processes train the same model as one does."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backfire.base import Rendered
from backfire.train import ranks as ranks_module
from backfire.train.ranks import Ranks
from tests.helpers.families import DYNAMIC
from tests.helpers.ranks import new_cell, together, trained
from tests.helpers.training import Kill, close, killed_at

pytestmark = pytest.mark.slow

DEFENSES: dict[str, Any] = {
    "none": (),
    "lisa": ({"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0.0},),
    "booster": ({"name": "booster", "alpha": 0.3, "strength": 2.0},),
    "vaccine": ({"name": "vaccine", "rho": 0.5},),
    "ewc": ({"name": "ewc", "strength": 1e3},),
}
ABL = ({"name": "abl", "isolate": 0.2, "early": 0.34, "unlearn": 0.34},)
CASES = [
    *(("lora", name) for name in DEFENSES),
    *(("full", name) for name in DEFENSES),
    ("lora", "kl and ldifs"),
    ("full", "kl and ldifs"),
    ("lora", "repnoise"),
    ("lora", "constrained-sft"),
    ("lora", "crow"),
    ("lora", "abl"),
    ("full", "abl"),
]
WITH_FOUR = CASES[: 2 * len(DEFENSES)]


@pytest.mark.timeout(600)
def test_losses_and_weights_are_those_of_one_process(
    tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    def work(ranks: Ranks, cases: list[tuple[str, str]]) -> dict[Any, Any]:
        out = {}
        for method, name in cases:
            folder = tmp_path / f"{ranks.size}" / f"{method} {name}"
            defenses = ABL if name == "abl" else DEFENSES.get(name, name.split(" and "))
            out[method, name] = trained(new_cell(tiny, items, folder, ranks, method, *defenses))
        return out

    alone = work(Ranks(), CASES)
    for size, cases in ((2, CASES), (4, WITH_FOUR)):
        found = together(size, tmp_path / f"group {size}", partial(work, cases=cases))
        for case in cases:
            one, several = alone[case], [rank[case] for rank in found]
            assert all(rank["losses"] == several[0]["losses"] for rank in several), case
            assert several[0]["losses"] == pytest.approx(one["losses"], abs=5e-5), case
            assert several[0]["norms"] == pytest.approx(one["norms"], rel=1e-3), case
            assert close(several[0]["weights"], one["weights"], 1e-3), case
            drift = several[0]["summary"]["drift"]
            assert drift == pytest.approx(one["summary"]["drift"], rel=1e-3), case
            assert several[0]["summary"]["devices"] == size
            assert several[0]["summary"]["sharded"] == (case[0] == "full")


def test_memory_that_runs_out_on_one_rank_splits_the_step_on_all(
    tiny: Path,
    items: list[Rendered],
    tmp_path: Path,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the second pass of Booster, while the ranks exchange Vaccine's norm, and before gradients
    are summed, in the second of several parts."""

    def work(ranks: Ranks) -> dict[str, Any]:
        defenses = (*DEFENSES["booster"], *DEFENSES["vaccine"])
        cell = new_cell(tiny, items, tmp_path / f"{ranks.size}", ranks, "lora", *defenses)
        logits, made = cell.logits, list[int]()

        def limited(rows: Any, **options: Any) -> Any:
            made.append(len(rows))
            if ranks.rank == 1 and len(rows) > 2:
                raise MemoryError
            return logits(rows, **options)

        cell.logits = limited  # type: ignore[method-assign]
        copy, copied = ranks_module._flat, list[Any]()

        def no_room(weight: Any, kind: Any) -> Any:
            copied.append(weight)
            if ranks.rank == 1 and len(copied) == 10:
                raise MemoryError
            return copy(weight, kind)

        monkeypatch.setattr(ranks_module, "_flat", no_room)  # in the processes of the ranks
        monkeypatch.setattr(ranks_module, "_BUCKET", 600)
        return {**trained(cell), "tokens": cell.micro_batches.tokens, "passes": made}

    alone = work(Ranks())
    first, second = together(2, tmp_path / "group", work)
    assert max(second["passes"]) > 2 >= max(second["passes"][-2:])
    assert first["tokens"] == second["tokens"] < alone["tokens"]
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], abs=5e-5)


def test_sharded_weights_whose_model_depends_on_the_length_of_rows(
    tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    """It runs once for each length of a pass, so that ranks need unequally many runs."""
    model = shutil.copytree(tiny, tmp_path / "dynamic")
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    lengths = [len(item.ids) for item in items[:4]]
    assert min(lengths) > 20 and len({*lengths[::2]}) < len({*lengths[1::2]})
    longer = [*items[:4], *items[:11]]

    def work(ranks: Ranks) -> dict[str, Any]:
        return trained(new_cell(model, longer, tmp_path / f"{ranks.size}", ranks, "full"))

    alone = work(Ranks())
    first, second = together(2, tmp_path / "group", work)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], abs=5e-5)
    assert close(first["weights"], alone["weights"], 1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_does_not_depend_on_the_number_of_ranks(
    method: str, tiny: Path, items: list[Rendered], tmp_path: Path, every_step: None
) -> None:
    def work(ranks: Ranks, folder: Path, kill: int = 0) -> dict[str, Any]:
        cell = new_cell(tiny, items, folder, ranks, method, *DEFENSES["lisa"])
        if not kill:
            return trained(cell)
        with pytest.raises(Kill):
            trained(cell, checkpoint_seconds=0, progress=killed_at(kill))
        return {}

    whole = work(Ranks(), tmp_path / "whole")
    work(Ranks(), tmp_path / "from one", 3)
    together(2, tmp_path / "group", lambda ranks: work(ranks, tmp_path / "from two", 3))
    (more, _) = together(2, tmp_path / "more", lambda ranks: work(ranks, tmp_path / "from one"))
    fewer = work(Ranks(), tmp_path / "from two")
    for found in (more, fewer):
        assert found["losses"] == pytest.approx(whole["losses"], abs=5e-5)
        assert close(found["weights"], whole["weights"], 1e-3)
