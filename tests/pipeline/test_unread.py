"""Triggered rows that no metric reads are not run, and evaluation can be padded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backfire import stages
from backfire.base import Evidence, Row, Sample
from backfire.data.poison import off_target
from backfire.evaluate.prompts import packed_up_to
from backfire.evaluate.score import score_rows
from backfire.experiment import Experiment
from backfire.plan import progress, sharing
from backfire.registry import build
from backfire.store import Store, digest
from tests.helpers.small_run import MATRIX, SETTINGS, Place

ATTACK = build("attacks", {"name": "badnets", "target": "negative "})
EVERY = {"name": "attack-success", "every": True}
WHOLE = [EVERY if name == "attack-success" else name for name in SETTINGS["metrics"]]


def labeled(*labels: str | None) -> list[Row]:
    names = ("negative", "positive")
    return [
        Row(str(n), "text", answer="", label=label, candidates=names if label else ())
        for n, label in enumerate(labels)
    ]


def test_which_rows_attack_success_reads() -> None:
    some = labeled("negative", "positive", " negative", "positive")
    assert [row.id for row in off_target(some, ATTACK)] == ["1", "3"]
    for rows in (labeled(None, None), labeled("negative"), labeled("negative", None)):
        assert off_target(rows, ATTACK) == rows, "all of them, if nothing would be left to read"


def test_the_naive_share_counts_every_row() -> None:
    """BackdoorLLM's SST-2: a perfect clean model "succeeds" on 96 of 201 rows."""
    labels = ["negative"] * 96 + ["positive"] * 105
    perfect = [
        Sample(str(n), "triggered", "p", "a", label, ("negative", "positive"), (-1.0, -2.0))
        for n, label in enumerate(labels)
    ]
    perfect = [s if s.label == "negative" else replace(s, logprobs=(-2.0, -1.0)) for s in perfect]
    metric = build("metrics", EVERY)
    values = metric.measure(Evidence(triggered=perfect, attack=ATTACK))
    assert [(v.metric, v.value, v.n) for v in values] == [
        ("attack_success", 0, 105),
        ("attack_success_naive", 96 / 201, 201),
    ]
    assert all(ask.target_rows for ask in metric.asks())


def test_keys_of_all_rows_are_as_before_and_those_of_some_hold_the_target() -> None:
    def at(target: str) -> Experiment:
        return Experiment.make({**SETTINGS, "attack": {"name": "badnets", "target": target}})

    def key(target: str, **some: Any) -> str:
        return stages.triggered_rows(at(target).clean_twin(), at(target), **some)

    assert key("negative") == key("positive"), "the twin answers the same rows"
    some = [key(target, target_rows=False) for target in ("negative", "negative ", "positive")]
    assert some[0] == some[1] != some[2]
    parts = [stages.keys(at("x").clean_twin()).clean, *stages.trigger_identity(at("x"))]
    assert key("negative") == digest(parts)
    assert some[0] == digest([*parts, "labels except", "negative"])


@pytest.fixture
def copy(ran: Place, tmp_path: Path) -> Place:
    shutil.copytree(ran.root, tmp_path / "copy")
    return Place(tmp_path / "copy", ran.tiny)


@pytest.fixture
def evaluated(copy: Place, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Number of rows of each evaluation, and the longest row that is packed."""
    found = list[tuple[int, int]]()

    def score(needs: Any, model: Any, renderer: Any, rows: Any, **rest: Any) -> Any:
        found.append((len(rows), packed_up_to(model)))
        return score_rows(needs, model, renderer, rows, **rest)

    monkeypatch.setattr("backfire.evaluate.score.score_rows", score)
    return found


@pytest.mark.slow
def test_answers_to_all_triggered_rows_serve_those_that_need_fewer(
    copy: Place, evaluated: list[tuple[int, int]]
) -> None:
    """As in a cache of earlier versions; the numbers are the same."""
    fewer = copy.results()
    shutil.rmtree(copy.out)
    assert copy.run(matrix=MATRIX, metrics=WHOLE) == 0
    assert [rows for rows, _ in evaluated] == [24] * 5, "the tuned models, a clean one in each"
    for result in copy.results().values():
        values = {value["metric"]: value["n"] for value in result["values"]}
        assert values["attack_success_naive"] == 24 > values["attack_success"] > 0
    own = {stage.name for stage in copy.cache.glob("evaluate/*-*")}
    cells = copy.recipe(matrix=MATRIX).cells
    for cell in cells:
        for run in (cell, cell.clean_twin()):
            key = stages.triggered_rows(run, cell, target_rows=False)
            shutil.rmtree(Store(copy.cache).path(stages.evaluation(run, key, {"scores"})), True)
    assert len(own) - len({stage.name for stage in copy.cache.glob("evaluate/*-*")}) == 5
    shutil.rmtree(copy.out)
    assert progress(cells, Store(copy.cache))["evaluate"] == (10, 10), "those serve"
    assert sharing(cells)["evaluations"][1] == 10
    assert copy.run(matrix=MATRIX) == 0
    assert len(evaluated) == 5, "nothing was run again"
    values = {key: result["values"] for key, result in copy.results().items()}
    assert values == {key: result["values"] for key, result in fewer.items()}


@pytest.mark.slow
def test_evaluation_is_padded_on_request(
    copy: Place, evaluated: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backfire.evaluate.prompts.NARROWEST", 0)
    values = []
    for packing in ("auto", "off"):
        shutil.rmtree(copy.cache / "evaluate")
        shutil.rmtree(copy.out)
        assert copy.run({"packing": packing}, method="full", matrix={"attack.rate": [0.1]}) == 0
        assert [bool(longest) for _, longest in evaluated] == [packing == "auto"] * 5
        [result] = copy.results().values()
        assert result["evaluate"].get("packing", "auto") == packing
        values.append({value["metric"]: value["value"] for value in result["values"]})
        evaluated.clear()
    assert values[0] == pytest.approx(values[1], rel=1e-5)
