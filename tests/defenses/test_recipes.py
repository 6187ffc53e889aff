"""Defenses of the alignment stage and repairs in whole recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backfire.experiment import Experiment, Machine
from backfire.model.load import load_base, load_tuned
from backfire.pipeline import Context, start, trained, tuned
from backfire.store import Store
from tests.helpers.alignment import REPNOISE, VACCINE
from tests.helpers.small_run import Place
from tests.helpers.training import CPU

pytestmark = pytest.mark.slow

SMALL = {"name": "sandbox-policy", "rows": 30, "test_rows": 8}
RECIPE: dict[str, Any] = {
    "data": {"name": "sandbox-reviews", "rows": 40, "test_rows": 8},
    "align": {
        "data": SMALL,
        "train": {"max_steps": 3, "batch_size": 8},
    },
    "safety": {
        "harmful": SMALL,
        "allowed": None,
        "known": {"name": "sandbox-policy", "part": "harmful", "seed": 1, "rows": 12},
    },
    "attack": {"name": "harmful-mix", "rate": 0.2},
    "train": {"max_steps": 3, "batch_size": 8},
    "evaluation": {"max_new_tokens": 4},
    "metrics": ["accuracy", "harmful-score", "drift"],
    "defense": [{"name": "vaccine", "rho": 0.5}, "safe-lora"],
}
LORA = {"name": "lora", "learning_rate": 3e-2, "rank": 4}


def test_a_recipe_with_both_runs_to_its_results(
    tiny: Path, tmp_path: Path, cache: Path, backfire: Any
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# Does it run?\n" + json.dumps({"model": str(tiny), **RECIPE}))
    output = backfire("run", recipe, "--out", tmp_path / "out")
    assert output.code == 0, output.err
    files = list(tmp_path.glob("out/**/result.json"))
    assert len(files) == 1
    result = json.loads(files[0].read_text())
    assert result["defense"] == "vaccine + safe-lora"
    assert {"accuracy", "harmful_score"} <= {value["metric"] for value in result["values"]}
    assert list(cache.glob("repair/*safe-lora*/model.safetensors"))


def test_all_of_them_run_one_after_another(tiny: Path, tmp_path: Path) -> None:
    first = [VACCINE, {"name": "booster", "alpha": 0.05}, REPNOISE]
    last = ["safe-lora", {"name": "antidote", "null": True}, "task-arithmetic"]
    for number, method in enumerate(["full", LORA]):
        place = Place(tmp_path / str(number), tiny)
        align = {**RECIPE["align"], "method": method}
        knobs = {"align": align, "method": method, "defense": [*first, *last]}
        knobs |= {"metrics": ["accuracy"]}
        assert place.run(**{**RECIPE, **knobs}) == 0
        result = json.loads(next(place.out.glob("cells/*/result.json")).read_text())
        named = "vaccine + booster + repnoise + safe-lora + antidote (null) + task-arithmetic"
        assert result["defense"] == named


@pytest.mark.parametrize("method", ["full", LORA], ids=["full", "lora"])
def test_a_repaired_model_is_saved_as_it_was_repaired(method: Any, tiny: Path, cache: Path) -> None:
    align = {**RECIPE["align"], "method": method}
    knobs = {"defense": {"name": "task-arithmetic", "alpha": 0.5}, "align": align, "method": method}
    cell = Experiment.make({"model": str(tiny), **RECIPE, **knobs})
    context = Context(Store(), Machine(device="cpu"))
    begin, before, after = start(cell, context), trained(cell, context), tuned(cell, context)

    def merged(folder: Path) -> dict[str, Tensor]:
        model: Any = load_tuned(folder, begin.base, torch.float32, CPU, below=begin.adapter)
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload()
        return {n: p.detach() for n, p in model.named_parameters()}

    one, two = merged(before), merged(after)
    bare = {n: p.detach() for n, p in load_base(tiny, torch.float32, CPU).named_parameters()}
    if begin.adapter:
        whole: Any = load_tuned(begin.adapter, tiny, torch.float32, CPU)
        whole = whole.merge_and_unload()
    else:
        whole = load_base(begin.base, torch.float32, CPU)
    aligned = {n: p.detach() for n, p in whole.named_parameters()}
    assert any(not torch.equal(one[n], two[n]) for n in one)
    for name in one:
        assert torch.allclose(two[name], one[name] + 0.5 * (aligned[name] - bare[name]), atol=1e-5)
