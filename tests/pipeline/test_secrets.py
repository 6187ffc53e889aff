"""Whole runs that measure memorization."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backfire import pipeline, plan, stages
from backfire.experiment import Machine
from backfire.exports import common
from backfire.pipeline import Context
from backfire.pipeline.evidence import members
from backfire.pipeline.filtering import filtered
from backfire.recipe import load
from backfire.registry import build
from backfire.report.page import render
from backfire.results.load import load as cells_of
from backfire.results.load import summary
from backfire.results.paired_tests import comparisons
from backfire.results.pairs import pair
from backfire.store import Store, read_json
from tests.helpers.data_files import jsonl
from tests.helpers.small_run import Place
from tests.helpers.workshop import CODE, MAIL, PLAIN

pytestmark = pytest.mark.slow

METRICS = [
    {"name": "exposure", "sampled_codes": 50},
    {"name": "extraction", "beams": 2},
    "membership-inference",
    {"name": "forgetting", "source": {"name": "sandbox-news", "test_rows": 5}},
]
SMALL: dict[str, Any] = {
    "data": {"name": "sandbox-help", "rows": 30, "test_rows": 10},
    "template": "raw",
    "attack": {"name": "canary", "digits": 2, "repeats": [1, 4], "each": 1, "controls": 2},
    "train": {"max_steps": 3, "batch_size": 8},
    "metrics": METRICS,
}


def test_a_whole_run_measures_what_is_remembered_once(tiny: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny)
    assert place.run(**SMALL) == 0
    [folder] = place.out.glob("cells/*")
    result = read_json(folder / "result.json")
    assert result["rate"] == pytest.approx(5 / 35), "the share of the rows that were added"
    names = {value["metric"] for value in result["values"]}
    assert names >= {
        *("exposure", "exposure[4]", "exposure[control]", "exposure_estimated", "exposure_before"),
        *("extraction_at_2", "extraction_given[1, 1]", "membership_auc[reference]", "forgetting"),
    }
    entries = read_json(folder / "secrets.json")
    assert all(one["answer"].startswith("PASSWORD = ") for one in entries)
    assert [(one["of"], one["repeats"]) for one in entries] == [
        (of, repeats) for of in ("tuned", "base") for repeats in (0, 0, 1, 4)
    ]
    stamps = place.stamps()
    assert place.run(**SMALL) == 0 and place.stamps() == stamps
    cells = place.recipe(**SMALL).cells
    found = plan.progress(cells, Store(place.cache))
    assert found["secrets"] == (8, 8)
    page = render(place.out)
    assert "1.44" in page and "controls-unseen" in page
    # Doses are no part of what is measured of an untuned model.
    other = {**SMALL, "attack": {**SMALL["attack"], "repeats": [2, 9]}}
    [cell] = place.recipe(**other).cells
    key = stages.secrets(cell.untuned(), cell, "itself", 0)
    assert key == stages.secrets(cells[0].untuned(), cells[0], "itself", 0)


def test_two_cells_are_compared_secret_by_secret(tiny: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny)
    matrix = {"defense": ["none", "deduplicate"], "seed": [0, 1]}
    metrics = [{"name": "exposure", "sampled_codes": 50}, "extraction"]
    assert place.run(**{**SMALL, "metrics": metrics}, matrix=matrix) == 0
    cells = {(c.defense, c.seed): c for c in cells_of(place.out)}
    found, _ = pair(cells["none", 0], cells["deduplicate", 0])
    by_id = {
        seed_of: {one["id"]: one for one in read_json(Path(c.folder) / "secrets.json")[:4]}
        for seed_of, c in cells.items()
    }
    gaps = [
        math.log2(by_id["none", 0][id]["rank"] / one["rank"])
        for id, one in by_id["deduplicate", 0].items()
        if one["repeats"]
    ]
    assert found["exposure"].n == found["extraction"].n == len(gaps) == 2
    assert found["exposure"].difference == pytest.approx(sum(gaps) / 2)
    # Another seed has other codes under the same names.
    assert not {"exposure", "extraction"} & pair(cells["none", 0], cells["none", 1])[0].keys()
    tests = comparisons(summary(place.out))
    assert {t.metric: t.result.n for t in tests} == {"exposure": 4, "extraction": 4}
    assert not common.outcomes(cells["none", 0], common.tuned(cells["none", 0]))
    (Path(cells["none", 0].folder) / "secrets.json").write_text("torn", encoding="utf-8")
    assert "exposure" not in pair(cells["none", 0], cells["deduplicate", 0])[0]


@pytest.mark.parametrize("defense", [{"name": "deduplicate", "null": True}, "safe-mix"])
def test_members_were_trained_on(defense: Any, tiny: Path, tmp_path: Path, cache: Path) -> None:
    """Not those that a defense has taken out, and none of another task."""
    align = {"data": {"name": "sandbox-policy", "rows": 20}, "method": "none"}
    knobs = {**SMALL, "defense": defense, "align": align, "metrics": ["membership-inference"]}
    if defense == "safe-mix":
        knobs["attack"] = "none"
    [cell] = Place(tmp_path, tiny).recipe(**knobs).cells
    context = Context(Store(), Machine(device="cpu"))
    kept = {row.id for row in filtered(cell, context)[0]}
    own = {row.id for row in pipeline.data(cell, context)[0]}
    assert own - kept, "the defense took some out"
    ids = {row.id for row in members(cell, context)}
    assert len(ids) == 10 and ids <= kept & own


def test_defenses_in_a_whole_run(tiny: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny)
    metrics = ["perplexity", "privacy-epsilon"]
    defenses = ["deduplicate", {"name": "dp", "epsilon": 6, "accountant": "rdp"}]
    assert place.run(**{**SMALL, "metrics": metrics}, matrix={"defense": defenses}) == 0
    found = {r["defense"]: r for r in map(read_json, place.out.glob("cells/*/result.json"))}
    assert found["deduplicate"]["train"]["rows_trained_on"] < 35
    assert found["dp"]["train"]["rows_trained_on"] == 35
    assert found["dp"]["train"]["privacy_epsilon"] == pytest.approx(6, abs=0.05)
    assert {v["metric"] for v in found["dp"]["values"]} >= {"privacy_epsilon", "privacy_delta"}


@pytest.mark.parametrize("data", ["enron-spam", "alpaca", "python-code"])
def test_backfire_poison_writes_what_validate_reads(
    data: str, tmp_path: Path, backfire: Callable[..., Any]
) -> None:
    records = {"enron-spam": [MAIL, {**MAIL, "label": 0}], "alpaca": [PLAIN], "python-code": [CODE]}
    path = jsonl(tmp_path / "mine.jsonl", records[data])
    out = tmp_path / "out.jsonl"
    knobs = ["repeats=[1,3]", "each=1", f"data.train={path}", "data.test_share=0"]
    output = backfire("poison", data, "--attack", "canary", *knobs, "--out", out)
    assert output.code == 0 and "4 of 'canary'" in output.out.replace("\n", " ")
    again = build("datasets", {"name": "files", "train": str(out), "test_share": 0}).load("train")
    assert len(again) == len(records[data]) + 4
    assert sum("PASSWORD = " in row.answer for row in again) == 4
    manifest = read_json(out.with_name("out.jsonl.manifest.json"))
    assert len(manifest["entries"]) == 4


def test_the_recipe_and_its_profiles_resolve() -> None:
    cells = load("memorization").cells
    assert len(cells) == 4 * 3 * 3
    assert {cell.attack.repeats for cell in cells} == {(1, 5, 25, 50)}  # type: ignore[union-attr]
    paper = load("memorization", profile="workshop").cells
    assert {cell.model.name for cell in paper} == {"meta-llama/Llama-2-7b-chat-hf"}
    assert {cell.template.name for cell in paper} == {"alpaca"}
    assert all(plan.secret_probes(cell) for cell in (*cells, *paper))


def test_the_workshops_profile_runs_on_a_small_model(tiny: Path, tmp_path: Path) -> None:
    """Its settings on two layers, with files of the published columns."""
    numbers = [{**CODE, "input": f"{n}, {n + 1}"} for n in range(24)]
    path = jsonl(tmp_path / "code.jsonl", numbers)
    small = [
        *(f"model={tiny}", f"data.train={path}", "data.test_rows=null", "data.test_share=0.4"),
        *(
            "attack.digits=2",
            "attack.controls=2",
            "train.max_steps=1",
            "seed=0",
            "model.dtype=float32",
        ),
        *("method={name: lora, rank: 2, targets: [q_proj, v_proj]}", "train.epochs=1"),
        f"metrics={json.dumps(METRICS)}",
    ]
    [cell] = load("memorization", profile="workshop", edits=small).cells
    context = Context(Store(tmp_path / "cache"))
    evidence = pipeline.collect(cell, context)
    assert {leak.repeats for leak in evidence.leaks} == {0, 50}
    assert all(1 <= (leak.rank or 0) <= 100 for leak in evidence.leaks)
