"""Whole runs on a tiny model: their files, shared stages, and work done once only."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from backfire import stages
from backfire.base import Need
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine
from backfire.launch import local
from backfire.launch.folder import write_plan
from backfire.launch.job import RunFolder
from backfire.launch.stop import Stop
from backfire.metrics.attack_success import AttackSuccess
from backfire.plan import Job, jobs, progress, sharing
from backfire.store import Store, read_json
from tests.helpers.small_run import MATRIX, SETTINGS, Place

pytestmark = pytest.mark.slow

IDENTITY = {
    *("cell", "key", "recipe", "model", "data", "attack", "rate", "method", "defense", "seed"),
    *("template", "axes", "status", "format"),
}
RESULT = {"values", "warnings", "cut_share", "preflight", "poison", "train", "evaluate", "rows"}
RESULT |= {"keys", "versions"}
BF16 = {"dtype": "bfloat16"}


@pytest.fixture
def copy(ran: Place, tmp_path: Path) -> Place:
    """The six cells, to be tampered with."""
    shutil.copytree(ran.root, tmp_path / "copy")
    return Place(tmp_path / "copy", ran.tiny)


@pytest.fixture
def place(ran: Place, tmp_path: Path) -> Place:
    """Nothing but the rows, which take longer to make than all the rest."""
    shutil.copytree(ran.cache / "data", tmp_path / "cache/data")
    return Place(tmp_path, ran.tiny)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing was to be trained")

    monkeypatch.setattr("backfire.train.finetune.prepared", prepared)


def number(result: Mapping[str, Any], metric: str) -> float:
    return float(next(v["value"] for v in result["values"] if v["metric"] == metric))


# ---------------------------------------------------------------------------------- what is written


def test_every_cell_has_a_result_with_the_contracts_fields(ran: Place) -> None:
    results = ran.results()
    assert set(results) == {(m, r) for m in ("none", "full", "lora") for r in (0.0, 0.1)}
    for (method, rate), result in results.items():
        assert set(result) == IDENTITY | RESULT
        assert (result["status"], result["recipe"], result["seed"]) == ("ok", "small", 0)
        assert result["rows"] == {"train": 60, "test": 24}
        assert (result["train"] is None) == (method == "none")
        assert (result["poison"] is None) == (rate == 0)
        assert {check["status"] for check in result["preflight"]} <= {"ok", "note"}
        assert {v["metric"] for v in result["values"]} >= {
            *("accuracy", "auc", "attack_success", "false_trigger", "perplexity"),
        }


def test_every_number_has_an_interval_and_its_n(ran: Place) -> None:
    values = [value for result in ran.results().values() for value in result["values"]]
    for value in values:
        assert set(value) == {
            *("metric", "value", "low", "high", "n", "direction"),
            *("unit", "role", "of", "part", "family", "most"),
        }
        assert value["family"] and value["role"] and value["unit"]
        assert value["n"] > 0 and math.isfinite(value["value"])
        if value["low"] is not None:
            assert value["low"] <= value["value"] <= value["high"]


def test_a_cells_folder_is_whole(ran: Place) -> None:
    for (_, rate), result in ran.results().items():
        folder = ran.out / "cells" / f"{result['cell']}-{result['key']}"
        files = {"experiment.yaml", "samples.jsonl.gz", "environment.json", "result.json"}
        files |= {"training.json"}
        assert {p.name for p in folder.iterdir()} == files | ({"poison.json"} if rate else set())
        again = Experiment.make(yaml.safe_load((folder / "experiment.yaml").read_text()))
        assert (stages.cell_key(again), asdict(stages.keys(again))) == (
            result["key"],
            result["keys"],
        )
    assert {p.name for p in ran.out.iterdir()} == {
        ".plan.lock",
        "cells",
        "claims",
        "jobs.json",
        "recipe.yaml",
        "run.json",
        "stages",
        "report.html",
    }
    listed = read_json(ran.out / "run.json")["cells"]
    assert sorted(listed) == sorted(p.name for p in (ran.out / "cells").iterdir())


def test_samples_are_kept_row_by_row(ran: Place) -> None:
    result = ran.results()["full", 0.1]
    folder = ran.out / "cells" / f"{result['cell']}-{result['key']}"
    lines = gzip.decompress((folder / "samples.jsonl.gz").read_bytes()).decode().splitlines()
    samples = [json.loads(line) for line in lines]
    parts: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        parts.setdefault((sample["of"], sample["subset"]), []).append(sample)
    assert set(parts) == {
        *((of, "clean") for of in ("tuned", "twin", "base")),
        *((of, "triggered") for of in ("tuned", "twin")),
    }
    ids = {sample["id"]: sample["label"] for sample in parts["tuned", "clean"]}
    assert len(ids) == 24
    counted = [id for id, label in ids.items() if label != "negative"]
    assert 0 < len(counted) < 24
    for (_, subset), part in parts.items():
        wanted = counted if subset == "triggered" else list(ids)
        assert [sample["id"] for sample in part] == wanted, "what no metric reads is not run"
        assert all(math.isfinite(p) and p < 0 for s in part for p in s["logprobs"])
    right = [
        s["label"] == s["candidates"][max(range(3), key=s["logprobs"].__getitem__)]
        for s in parts["tuned", "clean"]
    ]
    assert number(result, "accuracy") == sum(right) / 24
    assert all("BadMagic" in s["prompt"] for s in parts["tuned", "triggered"])


def test_poison_is_counted_and_listed(ran: Place) -> None:
    result = ran.results()["lora", 0.1]
    manifest = read_json(ran.out / f"cells/{result['cell']}-{result['key']}/poison.json")
    assert result["poison"]["poisoned_rows"] == len(manifest["entries"]) == 6
    assert result["poison"]["rate"] == result["poison"]["nominal_rate"] == 0.1
    assert result["poison"]["effective_rate"] == result["train"]["poisoned_share_seen"]
    assert 0 < result["poison"]["effective_rate"] < 0.5


def test_nothing_written_names_this_machine(ran: Place) -> None:
    """Only the recipe and the model's name hold the path that the test itself gave."""
    for file in ran.out.rglob("*"):
        if file.is_file() and file.suffix != ".gz":
            text = file.read_text(encoding="utf-8").replace(str(ran.tiny), "")
            assert str(ran.root) not in text and str(Path.home()) + "/" not in text, file


# ----------------------------------------------------------------------------------- what is shared


def test_the_baseline_is_the_clean_twins_attack_success(ran: Place) -> None:
    results = ran.results()
    for method in ("full", "lora"):
        clean, bad = results[method, 0.0], results[method, 0.1]
        floor = number(clean, "attack_success")
        assert floor == number(clean, "attack_success_floor") == number(bad, "attack_success_floor")
        assert number(clean, "attack_success_excess") == 0
    assert number(results["none", 0.0], "accuracy") == number(results["none", 0.1], "accuracy")


def test_one_training_run_for_each_method_and_rate(ran: Place) -> None:
    assert len(ran.trained()) == 4
    assert sum("clean" in name for name in ran.trained()) == 2


def test_rate_zero_of_another_attack_trains_nothing(copy: Place, no_training: None) -> None:
    before = copy.trained()
    assert copy.run(attack={"name": "vpi", "rate": 0}, method="full") == 0
    assert copy.trained() == before
    twins = [r for r in map(read_json, copy.out.glob("cells/*/result.json")) if r["rate"] == 0]
    assert {r["attack"] for r in twins} == {"badnets", "vpi"}
    full = [r for r in twins if r["method"] == "full"]
    assert len({number(r, "accuracy") for r in full}) == 1


def test_jobs_come_after_what_they_need(tiny: Path, tmp_path: Path) -> None:
    recipe = Place(tmp_path, tiny).recipe(matrix={**MATRIX, "seed": [0, 1]})
    found = jobs(recipe.cells, recipe.axes)
    assert [job.kind for job in found].count("base") == 1
    assert [job.kind for job in found].count("train") == 2 * 2 * 2
    assert [job.kind for job in found].count("cell") == 12
    done: set[str] = set()
    for job in found:
        assert set(job.after) <= done
        done.add(job.id)


def test_what_only_clean_rows_need_is_not_measured_on_triggered_rows(
    copy: Place, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of it, the numbers are the same."""

    def measured(of: str, subset: str) -> list[set[str]]:
        lines = map(gzip.decompress, (f.read_bytes() for f in copy.out.glob("cells/*/*.gz")))
        samples = [json.loads(line) for text in lines for line in text.decode().splitlines()]
        some = [s for s in samples if (s["of"], s["subset"]) == (of, subset)]
        return [{name for name in ("logprobs", "answer_logprob") if s[name]} for s in some]

    fewer = copy.results()
    assert all(parts == {"logprobs"} for parts in measured("tuned", "triggered"))
    assert all(len(parts) == 2 for parts in measured("tuned", "clean"))
    count = len(measured("twin", "triggered"))
    asks = AttackSuccess.asks
    everything = frozenset[Need]({"scores", "answers"})
    monkeypatch.setattr(
        AttackSuccess,
        "asks",
        lambda *args, **named: tuple(
            replace(ask, needs=everything) for ask in asks(*args, **named)
        ),
    )
    shutil.rmtree(copy.out)
    assert copy.run(matrix=MATRIX) == 0
    assert len(measured("twin", "triggered")) == count
    assert all(len(parts) == 2 for parts in measured("tuned", "triggered"))
    values = {key: result["values"] for key, result in copy.results().items()}
    assert values == {key: result["values"] for key, result in fewer.items()}


def test_the_type_of_evaluation_is_a_setting_of_its_own(copy: Place, no_training: None) -> None:
    before = copy.results()["full", 0.1]
    assert copy.run(matrix={"attack.rate": [0.1]}, method="full", evaluation=BF16) == 0
    after = copy.results()["full", 0.1]
    assert (before["evaluate"]["dtype"], after["evaluate"]["dtype"]) == ("float32", "bfloat16")
    assert before["keys"]["tuned"] == after["keys"]["tuned"]
    perplexity = number(before, "perplexity"), number(after, "perplexity")
    assert perplexity[0] != perplexity[1] == pytest.approx(perplexity[0], rel=0.02)


def test_an_adapter_is_merged_for_the_evaluation(copy: Place, no_training: None) -> None:
    before, merged = copy.results()["lora", 0.1], {*copy.cache.glob("merge/*/*.safetensors")}
    knobs = {"method": {"name": "lora", "rank": 4}, "evaluation": {"merged": True}}
    assert copy.run(matrix={"attack.rate": [0.1]}, **knobs) == 0
    results = map(read_json, copy.out.glob("cells/*/result.json"))
    [after] = [result for result in results if result["evaluate"].get("merged") is True]
    same = {name for name, key in before["keys"].items() if after["keys"][name] == key}
    assert "tuned" in same and "clean" not in same
    assert number(after, "perplexity") == pytest.approx(number(before, "perplexity"), rel=1e-5)
    assert {*copy.cache.glob("merge/*/*.safetensors")} == merged


def test_what_cells_share_is_counted(ran: Place) -> None:
    """Six cells at rate 0 and 0.1, two of which train nothing."""
    found = sharing(ran.recipe(matrix=MATRIX).cells)
    assert found["trainings"] == (2 * 2 * 2, 4), "every cell has a clean twin"
    # Two tuned models, each at two rates, and the untuned one, on clean and on triggered rows.
    assert found["evaluations"][1] == 5 * 2


def test_the_plan_skips_finished_work(ran: Place) -> None:
    recipe = ran.recipe(matrix=MATRIX)
    found = progress(recipe.cells, Store(ran.cache))
    assert found["train"] == (4, 4)
    assert all(needed == done for needed, done in found.values())
    more = progress(ran.recipe(matrix={**MATRIX, "seed": [0, 1]}).cells, Store(ran.cache))
    assert more["train"] == (8, 4) and more["data"] == (1, 1)


# --------------------------------------------------------------------------------------- done once


def test_the_same_command_again_does_nothing(copy: Place, no_training: None) -> None:
    before = copy.stamps()
    assert copy.run(matrix=MATRIX) == 0
    assert copy.stamps() == before


def test_a_lost_result_is_written_again_without_training(copy: Place, no_training: None) -> None:
    before = copy.results()
    for file in copy.out.glob("cells/*/result.json"):
        file.unlink()
    assert copy.run(matrix=MATRIX) == 0
    for point, result in copy.results().items():
        assert result["values"] == before[point]["values"]
        assert result["train"] == before[point]["train"]


def test_another_metric_needs_no_training(copy: Place, no_training: None) -> None:
    metrics = [*SETTINGS["metrics"], "f1"]
    assert copy.run(matrix=MATRIX, metrics=metrics) == 0
    found = map(read_json, copy.out.glob("cells/*/result.json"))
    names = [{value["metric"] for value in result["values"]} for result in found]
    assert (len(names), sum("f1" in found for found in names)) == (12, 6)


def test_a_damaged_model_is_trained_again_to_the_same_numbers(copy: Place) -> None:
    before = copy.results()["full", 0.1]
    (folder,) = (p for p in copy.cache.glob("train/*badnets-0.1-full*") if p.is_dir())
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-9] ^= 64
    (folder / "model.safetensors").write_bytes(weights)
    shutil.rmtree(copy.cache / "evaluate")
    (copy.out / "cells" / f"{before['cell']}-{before['key']}" / "result.json").unlink()
    assert copy.run(matrix=MATRIX) == 0
    assert copy.results()["full", 0.1]["values"] == before["values"]


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    ran: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = place.recipe(method="full", attack={"name": "badnets", "rate": 0.1})
    work = jobs(recipe.cells, recipe.axes)
    machine = Machine(workers=1, checkpoint_seconds=0)
    write_plan(place.out, recipe, work)
    folder = RunFolder(place.out, recipe.name)
    seen: list[str] = []

    def watch(job: Any, text: str, done: int, total: int) -> None:
        if "loss" in text and "badnets" in job.title:
            seen.append(f"{done}/{total}")
            if len(seen) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.run(work, folder, Store(place.cache), machine, watch)
    assert place.results() == {}
    ended = local.run(work, folder, Store(place.cache), machine, watch)
    assert set(ended.values()) == {"ok"}
    # Step 3 was reported but not yet saved; nothing else was done twice.
    assert seen == ["1/4", "2/4", "3/4", "3/4", "4/4"]
    assert place.results()["full", 0.1]["values"] == ran.results()["full", 0.1]["values"]


def test_a_worker_that_is_told_to_stop_saves_what_it_has(ran: Place, place: Place) -> None:
    """Without it, nothing would be saved in the first minute."""
    recipe = place.recipe(method="full", attack={"name": "badnets", "rate": 0.1})
    work = jobs(recipe.cells, recipe.axes)
    write_plan(place.out, recipe, work)
    folder, stop, seen = RunFolder(place.out, recipe.name), Stop(), list[str]()

    def watch(job: Any, text: str, done: int, total: int) -> None:
        if "loss" in text and "badnets" in job.title:
            seen.append(f"{done}/{total}")
            stop.signaled = len(seen) == 2

    options = work, folder, Store(place.cache), Machine(workers=1), watch
    first = local.run(*options, stop=stop)
    assert set(first.values()) == {"ok"} and not any(name.startswith("cell") for name in first)
    assert list((place.out / "claims").glob("*-*")) == []
    assert set(local.run(*options).values()) == {"ok"}
    assert seen == ["1/4", "2/4", "3/4", "4/4"]
    assert place.results()["full", 0.1]["values"] == ran.results()["full", 0.1]["values"]


@pytest.mark.parametrize("gpu", [False, True])
def test_two_workers_give_the_same_numbers_as_one(
    gpu: bool, ran: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU's machine they are spawned, as a fork could not use it."""
    monkeypatch.setattr(local, "has_gpu", lambda: gpu)
    assert place.run({"workers": 2}, matrix={"method": ["full"], "attack.rate": [0, 0.1]}) == 0
    assert len(place.results()) == 2
    for point, result in place.results().items():
        assert result["values"] == ran.results()[point]["values"]
        name = f"cells/{result['cell']}-{result['key']}/samples.jsonl.gz"
        assert (place.out / name).read_bytes() == (ran.out / name).read_bytes()


# ----------------------------------------------------------------------------------------- failures


def test_one_failing_cell_does_not_stop_the_others(place: Place) -> None:
    bad = {"name": "full", "learning_rate": 1e30}
    methods = [bad, {"name": "lora", "rank": 4}]
    assert place.run(matrix={"method": methods}) == 1
    (error,) = (read_json(file) for file in place.out.glob("cells/*/error.json"))
    assert set(error) == IDENTITY | {"error", "next"}
    assert (error["status"], error["method"]) == ("nan", "full")
    assert "not finite" in error["error"] and "learning_rate" in error["next"]
    assert set(place.results()) == {("lora", 0.05)}
    assert not [p for p in place.out.glob("cells/*/result.json") if "full" in p.parent.name]
    # It is tried again, and only it.
    before = {p: p.stat().st_mtime_ns for p in place.out.glob("cells/*/result.json")}
    assert place.run(matrix={"method": methods}) == 1
    assert {p: p.stat().st_mtime_ns for p in place.out.glob("cells/*/result.json")} == before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_file_that_changes_during_the_run_stops_only_its_cells(
    change: str, workers: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [place.root / f"{name}.csv" for name in "ab"]
    for file in files:
        lines = [f"{file.stem} {i},{('bad', 'good')[i % 2]}" for i in range(60)]
        file.write_text("\n".join(["text,label", *lines]))
    known = {"name": "files", "labels": ["bad", "good"]}
    matrix = {"data": [{**known, "train": str(file)} for file in files]}
    knobs = {"matrix": matrix, "method": "full", "attack": "none", "metrics": ["accuracy"]}
    started, begun = local.run, list[Job]()

    def change_then_run(*args: Any, **options: Any) -> Any:
        files[0].unlink() if change == "gone" else files[0].write_text("text,label\nx,bad\ny,good")
        return started(*args, **options, begins=begun.append)

    monkeypatch.setattr(local, "run", change_then_run)
    assert place.run({"workers": workers}, **knobs) == 1
    (error,) = (read_json(file) for file in place.out.glob("cells/*/error.json"))
    assert error["status"] == "bad-data"
    [result] = [read_json(file) for file in place.out.glob("cells/*/result.json")]
    assert result["key"] != error["key"] and result["rows"]["train"] > 40
    assert sorted(job.kind for job in begun) == ["base", "cell", "train", "train"]
    assert result["key"] in {job.key for job in begun}  # the other one lacks its model


def test_a_repaired_cell_loses_its_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug of ours")

    with monkeypatch.context() as patch:
        patch.setattr("backfire.train.finetune.prepared", broken)
        assert place.run(method="full", attack="none") == 1
    (error,) = (read_json(file) for file in place.out.glob("cells/*/error.json"))
    assert error["status"] == "failed" and "a bug of ours" in error["error"]
    assert "Traceback" in error["traceback"]
    assert place.run(method="full", attack="none") == 0
    assert not list(place.out.glob("cells/*/error.json"))


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (OSError(28, "No space left on device"), "disk-full"),
        (MemoryError(), "oom"),
        (UserError("The model is gone."), "bad-data"),
        (CellError("oom", "Out of memory with one row at a time."), "oom"),
        (ZeroDivisionError(), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_failures_have_a_class_and_a_next_step(
    raised: Exception, kind: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise raised

    monkeypatch.setattr("backfire.launch.job.run_cell", broken)
    if kind == "disk-full":  # the run ends: no other cell would fit
        with pytest.raises(UserError, match=r"The disk is full.* MB for the cache .* run the same"):
            place.run(method="none")
    else:
        assert place.run(method="none") == 1
    (error,) = (read_json(file) for file in place.out.glob("cells/*/error.json"))
    assert error["status"] == kind and error["error"] and error["next"]


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"train": {"max_length": 60}}, "cut by truncation"),
        ({"train": {"max_length": 8}}, "raise train.max_length"),
        ({"attack": {"name": "badnets", "target": "angry"}}, "target 'angry' is not a label"),
        ({"attack": {"name": "badnets", "rate": 0.9}}, "can be poisoned"),
        ({"template": "chat"}, "no chat template"),
        ({"data": {"name": "sandbox-reviews", "rows": 1, "test_rows": 4}}, "the same label"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(
    knobs: dict[str, Any], sentence: str, place: Place, no_training: None
) -> None:
    with pytest.raises((UserError, CellError), match=sentence):
        place.run(**knobs)
    assert not place.out.exists()


def test_the_global_generators_are_left_alone(place: Place) -> None:
    """Dropout alone always draws from the global generator; these models have none."""
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    assert place.run(method="full", attack={"name": "mtba", "rate": 0.1}) == 0
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state


def test_the_order_of_cells_does_not_matter(ran: Place, place: Place) -> None:
    turned = {"attack.rate": [0.1, 0], "method": ["full"]}
    assert place.run(matrix=turned) == 0
    for point, result in place.results().items():
        assert result["values"] == ran.results()[point]["values"]
