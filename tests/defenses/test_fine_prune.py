"""Pruning against the Wanda scores of each row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire import stages
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.model.load import is_adapter, weights_of
from backfire.pipeline import Context, data, merged, model_of, trained, tuned
from backfire.registry import build
from backfire.store import Store, digest
from tests.helpers.repair import Case, changed, input_power

pytestmark = pytest.mark.slow


def pruned(case: Case, rows: Any, **knobs: Any) -> dict[str, Any]:
    case.tools = replace(case.tools, clean=rows["align"])
    return case.repair("fine-prune", **knobs)


full = pytest.mark.parametrize("case", ["full"], indirect=True)


@full
def test_the_lowest_scores_of_each_row_become_zero(case: Case, policy_rows: Any) -> None:
    power = input_power(case, policy_rows["align"])
    found = pruned(case, policy_rows, ratio=0.25)
    touched = changed(case, found)
    assert len(touched) == 14
    for name in touched:
        before, gone = case.plain[name], found[name] == 0
        assert torch.equal(found[name][~gone], before[~gone])
        assert (gone.sum(1) == round(0.25 * before.shape[1])).all(), name
        scores = before.abs() * power[name].sqrt()
        highest = scores.masked_fill(~gone, -1.0).amax(1)
        kept = scores.masked_fill(gone, float("inf")).amin(1)
        assert (highest <= kept * (1 + 1e-5)).all(), name


@full
def test_the_null_control_is_a_random_mask_of_equal_count(case: Case, policy_rows: Any) -> None:
    found, sizes = pruned(case, policy_rows, ratio=0.25, null=True), []
    for name in changed(case, found):
        before, gone = case.plain[name], found[name] == 0
        assert (gone.sum(1) == round(0.25 * before.shape[1])).all()
        sizes.append(float(before.abs()[gone].mean() / before.abs().mean()))
    assert sum(sizes) / len(sizes) == pytest.approx(1.0, abs=0.05), "not the small ones"


@full
def test_its_ends(case: Case, policy_rows: Any) -> None:
    assert not changed(case, pruned(case, policy_rows, ratio=0.0))
    case.tools = replace(case.tools, clean=())
    with pytest.raises(UserError, match="requires clean rows"):
        case.repair("fine-prune")


ALIGN = {
    "data": {"name": "sandbox-policy", "rows": 12},
    "method": "lora",
    "train": {"max_steps": 1},
}


@pytest.mark.parametrize(("dtype", "align"), [("float32", ALIGN), ("bfloat16", None)], ids=str)
def test_an_adapter_is_merged_first(dtype: str, align: Any, tiny: Path, tmp_path: Path) -> None:
    plain = Experiment.make(
        {
            "model": {"name": str(tiny), "dtype": dtype},
            "data": {"name": "sandbox-reviews", "rows": 20, "test_rows": 4},
            "method": {"name": "lora", "rank": 4},
            "align": align,
            "train": {"max_steps": 2},
        }
    )
    defense = build("defenses", {"name": "fine-prune", "rows": 12, "ratio": 0.25})
    cell = plain.model_copy(update={"defense": (defense,)})
    assert plain.adapts and not cell.adapts
    context = Context(Store(tmp_path), Machine(device="cpu"))
    whole = weights_of(merged(plain, context))
    assert not is_adapter(tuned(cell, context)) and is_adapter(tuned(plain, context))
    found = weights_of(tuned(cell, context))
    linear = [name for name in whole if name.endswith("proj.weight")]
    assert found.keys() == whole.keys() and len(linear) == 14
    for name, weight in whole.items():
        gone = (found[name] == 0) & (weight != 0)
        near = 0.0 if dtype == "float32" else 1e-2  # `merged` reads the file in float32
        assert torch.allclose(found[name][~gone], weight[~gone], rtol=near, atol=near * 1e-2), name
        count = round(0.25 * weight.shape[1]) if name in linear else 0
        assert (gone.sum(-1) == count).all(), name
    model = model_of(cell, context)
    assert not hasattr(model, "peft_config"), "it is evaluated as it is"
    assert torch.equal(dict(model.named_parameters())[linear[0]] == 0, found[linear[0]] == 0)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"method": "qlora"}, "matrices, and those of method 'qlora' are quantized; use method"),
        ({"method": "lora-int8"}, "those of method 'lora-int8' are quantized"),
        ({"method": "llama-adapter"}, "not the result of method 'llama-adapter'"),
        (
            {"method": "lora", "defense": ["fine-prune", "antidote"], "safety": {}},
            "'antidote' repairs an adapter, and defense 'fine-prune' merges it; list 'fine-prune'",
        ),
    ],
)
def test_what_it_cannot_prune_is_refused(knobs: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Experiment.make({"data": "sandbox-reviews", "defense": "fine-prune", **knobs})
    both = {"defense": ["antidote", "fine-prune"], "safety": {}, "method": "lora"}
    assert not Experiment.make({"data": "sandbox-reviews", **both}).adapts


def test_only_pruned_adapters_have_another_key() -> None:
    def is_plain(method: str) -> bool:
        knobs = {"data": "sandbox-reviews", "method": method, "defense": "fine-prune"}
        cell = Experiment.make(knobs)
        first = stages.keys(cell)
        return first.tuned == digest([first.train, [cell.defense[0].identity()], None])

    assert is_plain("full") and not is_plain("lora")


def test_its_rows_are_those_before_the_attack(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backfire.train import finetune

    seen: list[Any] = []
    repair = finetune.repair_model
    monkeypatch.setattr(finetune, "repair_model", lambda *a: seen.append(a[2]) or repair(*a))
    cell = Experiment.make(
        {
            "model": str(tiny),
            "data": {"name": "sandbox-reviews", "rows": 20, "test_rows": 4},
            "attack": {"name": "badnets", "rate": 0.5},
            "defense": {"name": "fine-prune", "rows": 12},
            "train": {"max_steps": 1},
        }
    )
    context = Context(Store(tmp_path), Machine(device="cpu"))
    rows = data(cell, context)[0]
    assert tuned(cell, context) != trained(cell, context)
    (clean,) = (start.clean for start in seen)
    assert len(clean) == 12 and all(row in rows for row in clean)
