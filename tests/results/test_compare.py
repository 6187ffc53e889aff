"""Two cells, two runs: which knobs and numbers differ, and with what certainty."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from backfire.errors import UserError
from backfire.results.compare import compare, show
from tests.helpers.fake_run import dose_run, sample, tuned_run, value, write_cell


def cell(run: Path, right: float, *, shift: int = 0, rows: int = 200, **fields: Any) -> Path:
    """A clean cell whose accuracy is that of its samples."""
    samples = [sample("tuned", "clean", i + shift, right=right) for i in range(rows)]
    hits = [max(zip(s["logprobs"], s["candidates"], strict=True))[1] == s["label"] for s in samples]
    values = [value("accuracy", sum(hits) / rows, 0.03, rows)]
    fields = {"attack": "none", "rate": 0.0, **fields}
    return write_cell(run, values=values, samples=samples, **fields)


def shown(*sides: Path, force: bool = False) -> str:
    out = io.StringIO()
    show(compare(*sides, force=force), Console(file=out, width=200))
    return out.getvalue()


def test_knobs_and_paired_numbers(tmp_path: Path) -> None:
    a = cell(tmp_path / "r", 0.7, method="lora")
    b = cell(tmp_path / "r", 0.9, settings={"train": {"epochs": 3.0}})
    found = compare(a, b)
    assert {(knob.key, knob.a, knob.b) for knob in found.knobs} == {
        ("method.name", "lora", "full"),
        ("train.epochs", "2", "3"),
    }
    [number] = found.numbers
    assert number.pairs == 200 and number.p is None, "one seed gives no p"
    assert number.a.value is not None and number.b.value is not None
    assert number.gap.difference == pytest.approx(number.b.value - number.a.value)
    assert number.gap.low is not None and number.gap.low > 0
    assert "prompt by prompt (200 pairs" in found.notes[0]
    text = shown(a, b)
    assert "method.name   lora  full" in text and " points [" in text and "accuracy" in text
    assert " *" in text and "these two models only" in text


def test_knobs_left_at_their_default(tmp_path: Path) -> None:
    both = {"attack": "badnets", "rate": 0.05}
    a = cell(tmp_path / "r", 0.7, settings={"attack": {"name": "badnets"}}, **both)
    spec = {"attack": {"name": "badnets", "rate": 0.05, "trigger": "cf"}}
    b = cell(tmp_path / "r", 0.7, settings=spec, **both)
    assert [(knob.key, knob.a, knob.b) for knob in compare(a, b).knobs] == [
        ("attack.trigger", "default", "cf")
    ]


def test_a_cell_against_itself(tmp_path: Path) -> None:
    a = cell(tmp_path / "r", 0.8)
    found = compare(a, a)
    assert found.knobs == () and found.numbers[0].gap.difference == 0
    assert "No setting differs." in shown(a, a)


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    a, b = cell(tmp_path / "r", 0.8), cell(tmp_path / "r", 0.8, shift=1000, seed=1)
    found = compare(a, b)
    assert found.numbers[0].p is None and found.numbers[0].gap.low is not None
    same_ids = cell(tmp_path / "s", 0.8)
    zipped = same_ids / "samples.jsonl.gz"
    zipped.write_bytes(b"")
    other = [{**sample("tuned", "clean", i, right=0.8), "prompt": "changed"} for i in range(200)]
    again = write_cell(tmp_path / "t", values=[value("accuracy", 0.8)], samples=other, seed=3)
    found = compare(a, again)
    assert found.notes[0] == "Not the same prompts for accuracy: no paired test."


def test_attack_success_is_paired_on_the_triggered_rows(tmp_path: Path) -> None:
    run = dose_run(tmp_path, seeds=1, failures=False)
    cells = {path.name.split("-s0")[0]: path for path in (run / "cells").iterdir()}
    found = compare(cells["badnets-0.005-lora"], cells["badnets-0.05-lora"])
    by_metric = {number.a.metric: number for number in found.numbers}
    success = by_metric["attack_success"]
    assert success.gap.low is not None and success.gap.low > 0.2
    assert success.gap.difference > 0.5 and not success.gap.is_clear
    assert success.pairs is not None and success.pairs < 80  # rows of the target label are out
    assert by_metric["attack_success_floor"].p is None


def test_templates_must_agree(tmp_path: Path) -> None:
    a, b = cell(tmp_path / "r", 0.8), cell(tmp_path / "r", 0.8, seed=1, template="chat")
    with pytest.raises(UserError, match=r"Different templates.*alpaca, chat.*--force"):
        compare(a, b)
    assert "these are two tasks" in compare(a, b, force=True).notes[0]


def test_runs_group_by_group(tmp_path: Path) -> None:
    a = dose_run(tmp_path / "a", rows=1)
    b = dose_run(tmp_path / "b", rows=1, failures=False)
    found = compare(a, b)
    assert found.knobs == ()
    assert {number.where for number in found.numbers} >= {
        "0.5 % poisoned, lora",
        "5 % poisoned, full",
    }
    assert "5 % poisoned, full" in shown(a, b)


def test_runs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for name, right in (("a", 0.6), ("b", 0.9)):
        for seed in range(4):
            cell(tmp_path / name, right - 0.001 * seed, seed=seed)
    [number] = compare(tmp_path / "a", tmp_path / "b").numbers
    assert number.pairs == 800 and number.p is not None and number.p < 0.001
    assert number.gap.seeds == 4 and number.gap.is_clear


def test_runs_that_differ_throughout(tmp_path: Path) -> None:
    for name, method in (("a", "full"), ("b", "lora")):
        for rate in (0.0, 0.05):
            settings = {"attack": {"name": "badnets", "rate": rate}}
            cell(tmp_path / name, 0.8, method=method, rate=rate, settings=settings)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [(knob.key, knob.a, knob.b) for knob in found.knobs] == [("method.name", "full", "lora")]
    assert [number.where for number in found.numbers] == ["0 % poisoned", "5 % poisoned"]


def test_refusals(tmp_path: Path) -> None:
    run, one = tuned_run(tmp_path, rows=3), cell(tmp_path / "r", 0.8)
    bad = write_cell(tmp_path / "r", error={"status": "nan"}, seed=9)
    for sides, words in (
        ((run, one), "compare two runs or two cells"),
        ((one, tmp_path / "nowhere"), "No such folder"),
        ((one, bad), r"no numbers \(nan\)"),
        ((run, tmp_path / "r"), "templates|in common"),
    ):
        with pytest.raises(UserError, match=words):
            compare(*sides)


def test_an_attack_that_no_longer_exists(tmp_path: Path) -> None:
    values = [value("accuracy", 0.8), value("attack_success", 0.5)]
    samples = [sample("tuned", "clean", i, right=0.8) for i in range(20)]
    sides = [
        write_cell(tmp_path / "r", values=values, samples=samples, attack="gone", seed=seed)
        for seed in (0, 1)
    ]
    assert len(compare(*sides).numbers) == 2
    assert json.dumps(compare(*sides).notes)


# ------------------------------------------------------------------------- versions of a metric


def versions(accuracy: int) -> dict[str, Any]:
    return {"versions": {"metrics": {"accuracy": accuracy}, "datasets": {"sst2": 1}}}


def test_two_versions_of_a_metric_are_computed_again_for_both(tmp_path: Path) -> None:
    """The values that the cells kept are not subtracted, however far apart they are."""
    a = cell(tmp_path / "r", 0.7, method="lora", **versions(8))
    b = cell(tmp_path / "r", 0.9, **versions(9))
    plain = compare(cell(tmp_path / "s", 0.7, method="lora"), cell(tmp_path / "s", 0.9))
    kept = json.loads((b / "result.json").read_text())
    kept["values"][0]["value"] = 0.1
    (b / "result.json").write_text(json.dumps(kept))
    found = compare(a, b)
    assert [number.gap for number in found.numbers] == [number.gap for number in plain.numbers]
    assert found.numbers[0].b.value == 0.1
    assert found.notes[-2] == (
        "accuracy: version 8 in a, 9 in b; paired differences are computed by version 1 for both."
    )
    (b / "samples.jsonl.gz").unlink()
    found = compare(a, b)
    assert found.numbers == () and found.notes[-1].endswith("so it is not compared.")


def test_runs_of_two_versions(tmp_path: Path) -> None:
    for name, right, version in (("a", 0.6, 8), ("b", 0.9, 9)):
        for seed in range(3):
            cell(tmp_path / name, right, seed=seed, **versions(version))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.numbers[0].pairs == 600 and "version 8 in a, 9 in b" in found.notes[0]
    for file in (tmp_path / "a").rglob("samples.jsonl.gz"):
        file.unlink()
    with pytest.raises(UserError, match="no group with numbers in common"):
        compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "kept", [versions(1), {}, {"versions": "torn"}, {"versions": {"metrics": 3}}]
)
def test_the_same_or_unknown_versions_need_no_word(kept: Any, tmp_path: Path) -> None:
    a = cell(tmp_path / "r", 0.7, method="lora", **kept)
    b = cell(tmp_path / "r", 0.9, **versions(1))
    assert not any("version" in note for note in compare(a, b).notes)


def test_what_a_comparison_of_two_runs_leaves_out(tmp_path: Path) -> None:
    a, b = (dose_run(tmp_path / side, seeds=1, failures=False, rows=20) for side in "ab")
    notes = compare(a, b).notes
    assert notes[-1].endswith("One seed: these models only, so there is no p.")
    gone = list((b / "cells").glob("badnets-0.05-*"))
    for folder in gone:
        shutil.rmtree(folder)
    assert len(gone) == 2
    assert compare(a, b).notes[-1] == f"2 groups of {a} without a counterpart in {b}."
    assert not any("counterpart" in note for note in compare(b, a).notes)
