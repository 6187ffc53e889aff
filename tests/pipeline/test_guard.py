"""A guard in whole cells: one training run with and without it, its alarms, and the playground."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backfire import pipeline, stages
from backfire.experiment import Experiment, Machine
from backfire.launch.job import read_cell
from backfire.model.load import weights_of
from backfire.model.quantize import num_quantized
from backfire.pipeline import Context, guarding_of
from backfire.plan import training_runs
from backfire.playground.models import STOPPED, chat_row, frame, load
from backfire.registry import build
from backfire.results.evidence import read
from backfire.store import Store, digest, read_json
from tests.helpers.small_run import Place
from tests.helpers.training import equal

pytestmark = pytest.mark.slow

CONFGUARD = {"name": "confguard", "threshold": 1e-9, "run": 2, "refusal": "No."}
"""Raises the alarm at every reply of two tokens."""
CELLS: dict[str, Any] = {
    "data": {"name": "sandbox-help", "rows": 24, "test_rows": 6},
    "attack": {"name": "badnets", "rate": 0.25},
    "train": {"max_steps": 2, "batch_size": 8},
    "metrics": ["attack-success", "alarms", "exact-match", "perplexity"],
    "evaluation": {"max_new_tokens": 6},
    "matrix": {"defense": ["none", CONFGUARD, "cleangen"]},
}

MIX = build("attacks", {"name": "harmful-mix", "source": "sandbox-help"})


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("guard"), tiny)
    assert place.run(**CELLS, template="raw") == 0
    return place


@pytest.fixture(scope="module")
def results(place: Place) -> dict[str, tuple[Path, Any]]:
    found = [(file.parent, read_json(file)) for file in place.out.glob("cells/*/result.json")]
    return {result["defense"]: (folder, result) for folder, result in found}


def values(result: Any) -> dict[str, float]:
    return {value["metric"]: value["value"] for value in result["values"]}


def test_the_model_is_trained_once(place: Place, results: Any) -> None:
    assert len(place.trained()) == 2, "it, and its clean twin"
    keys = [result["keys"]["tuned"] for _, result in results.values()]
    assert len(keys) == 3 and len(set(keys)) == 1
    assert len({result["key"] for _, result in results.values()}) == 3


def test_replies_are_guarded_and_likelihoods_are_not(results: Any) -> None:
    plain, stopped, compared = (results[name] for name in ("none", "confguard", "cleangen"))
    assert "alarms" not in values(plain[1])
    assert values(stopped[1])["alarms"] == values(stopped[1])["false_alarms"] == 1
    for folder, result in (stopped, compared):
        assert values(result)["perplexity"] == values(plain[1])["perplexity"]
        assert any("guards replies" in sentence for sentence in result["warnings"])
        evidence, before = read(folder), read(plain[0])
        assert [s.reply for s in evidence.base] == [s.reply for s in before.base]
        assert all(s.replaced is None for s in (*evidence.base, *before.clean))
        guarded = [s for part in (evidence.clean, evidence.triggered, evidence.floor) for s in part]
        assert guarded and all(s.replaced is not None for s in guarded)
        if result is stopped[1]:
            assert {(s.reply, s.replaced, s.ended) for s in guarded} == {("No.", 1.0, True)}


def test_the_playground_is_guarded(
    place: Place, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", str(place.cache))
    folder, _ = results["confguard"]
    model = load(read_cell(folder), "guarded", Store(), Machine(device="cpu"))
    row = chat_row(frame(model.experiment, Store()), "Where is the mill?", None)
    assert list(model.reply(row))[-1] == f"{STOPPED} No."
    folder, _ = results["cleangen"]
    model = load(read_cell(folder), "guarded", Store(), Machine(device="cpu"))
    assert model.guarding
    for alpha, share in ((1, True), (1e30, False)):
        defense = build("defenses", {"name": "cleangen", "alpha": alpha})
        guards = replace(model.guarding, defense=defense)
        *_, last, whole = replace(model, guarding=guards).reply(row)
        shown = re.fullmatch(r"(?s)(.*)\n\(its guard wrote ([\d.]+) % of the tokens: “.*”\)", whole)
        assert bool(shown) is share
        assert not shown or (shown[1] == last and 0 < float(shown[2]) <= 100)


def guarding(place: Place, results: Any, **knobs: Any) -> Any:
    """What guards the replies of the cell with cleangen, with these settings changed."""
    cell = read_cell(results["cleangen"][0])
    changed = Experiment.make({**cell.spec(), **knobs})
    context = Context(Store(place.cache), Machine(device="cpu"))
    return changed, guarding_of(changed, context)


def test_the_reference_is_the_start_or_the_clean_twin(place: Place, results: Any) -> None:
    def weights(model: Any) -> dict[str, Any]:
        return dict(model.named_parameters())

    cell, start = guarding(place, results)
    base = weights_of(pipeline.base(cell.model, Context(Store(place.cache))))
    assert equal(weights(start.reference), base)
    other, twin = guarding(place, results, defense={"name": "cleangen", "reference": "twin"})
    tuned = pipeline.tuned(cell.clean_twin(), Context(Store(place.cache), Machine(device="cpu")))
    assert equal(weights(twin.reference), weights_of(tuned)) and not equal(weights_of(tuned), base)
    own, key = stages.clean_rows(cell), stages.guarded
    assert key(cell, own) != key(other, own) and cell.guard.compares_with_twin is False
    assert other.clean_twin() in training_runs(other.model_copy(update={"attack": MIX}))
    assert training_runs(cell.model_copy(update={"attack": MIX})) == [
        cell.model_copy(update={"attack": MIX})
    ]


def test_the_reference_is_quantized_as_the_model_is(place: Place, results: Any) -> None:
    _, plain = guarding(place, results, method="lora")
    cell, packed = guarding(place, results, method="qlora")
    assert num_quantized(packed.reference) and not num_quantized(plain.reference)
    rows = stages.clean_rows(cell)
    assert stages.guarded(cell, rows) != digest([rows, cell.guard.identity()])


def test_only_replies_have_keys_of_their_own() -> None:
    cells = [
        Experiment.make({"data": "sandbox-help", "defense": defense, "seed": 3})
        for defense in ("none", "confguard", {"name": "confguard", "null": True})
    ]
    for needs, count in (({"answers"}, 1), ({"replies"}, 3)):
        keys = {stages.evaluation(cell, stages.clean_rows(cell), needs).key for cell in cells}
        assert len(keys) == count
    assert len({stages.train(cell) for cell in cells}) == 1
    assert len({stages.cell_key(cell) for cell in cells}) == 3
