"""The benchmark's two sides do the same work. Times are not checked."""

from __future__ import annotations

import importlib
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.places import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of `make bench` in small: both methods, once each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        bench = importlib.import_module("benchmarks.bench")
        out = tmp_path_factory.mktemp("results")
        sizes = ["--rows", "32", "--test-rows", "12", "--max-new-tokens", "4"]
        path = bench.main(
            ["--tiny", "--skip-memory", "--repetitions", "1", *sizes, "--out", str(out)]
        )
        usage = _usage(tmp_path_factory)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**result, "markdown": path.with_suffix(".md").read_text("utf-8"), "usage": usage}


def _usage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Positions that each side runs, counted in this process (peaks mean nothing here)."""
    cells, memory = (importlib.import_module(f"benchmarks.{name}") for name in ("cells", "memory"))
    folder = tmp_path_factory.mktemp("usage")
    base = cells.tiny_base(folder / "base")
    sizes = {"rows": 32, "test_rows": 8, "epochs": 1.0, "max_new_tokens": 3}
    cell = cells.make_cell("sandbox", "full", base=base, template="alpaca", **sizes)
    cell = cells.build(json.loads(json.dumps(cell.spec())))
    usage = {name: memory.usage(name, cell, folder / name) for name in ("baseline", "backfire")}
    return {**usage, "tokens": sum(len(item.ids) for item in cell.rendered()[0])}


def test_losses_are_the_same(found: dict[str, Any]) -> None:
    for cell in found["cells"]:
        assert cell["equality"]["same tokens"] is True
        assert cell["equality"]["steps compared"] == 2  # the first and the last
        assert cell["equality"]["loss difference"] < 1e-4
        assert cell["equality"]["last loss"]["backfire"] < 6.5


def test_trl_trains_the_same_if_it_is_installed(found: dict[str, Any]) -> None:
    trl = importlib.util.find_spec("trl")
    for cell in found["cells"]:
        difference = cell["equality"]["loss difference, trl"]
        assert (difference is None) if trl is None else difference < 1e-4
        assert ("trl" in cell["medians"]["training loop"]) == (trl is not None)


def test_useful_mfu_compares_with_the_measured_peak(found: dict[str, Any]) -> None:
    for cell in found["cells"]:
        mfu, seconds = cell["mfu"], cell["medians"]["training loop"]
        assert mfu["peak"].keys() == {"float32"} and mfu["peak"]["float32"] > 1e8
        for who in ("baseline", "backfire"):
            reached = mfu["useful_flops"] / seconds[who] / mfu["peak"]["float32"]
            assert mfu["useful_mfu"][who] == pytest.approx(reached)


def test_evaluation_is_the_same(found: dict[str, Any]) -> None:
    for cell in found["cells"]:
        equality = cell["equality"]
        assert equality["log-likelihood difference"] < 1e-4
        assert equality["log-likelihood difference, own weights"] < 1e-3
        assert equality["equal replies"] == equality["equal replies of the base"] == 1.0
        for metric in ("accuracy", "exact match"):
            assert equality[metric]["backfire"] == equality[metric]["baseline"]


def test_json_holds_what_was_measured_and_where(found: dict[str, Any]) -> None:
    assert {"torch", "transformers", "peft", "cpu", "cores", "commit"} <= found[
        "environment"
    ].keys()
    assert found["settings"]["rows"] == 32
    assert [cell["title"] for cell in found["cells"]] == ["sandbox lora", "sandbox full"]
    for cell in found["cells"]:
        for times in (cell, cell["cpu"]):
            assert times["seconds"].keys() == times["medians"].keys()
            for phase, sides in times["seconds"].items():
                assert {"baseline", "backfire"} <= sides.keys(), phase
                assert all(len(seconds) == 1 for seconds in sides.values())
                assert times["ratios"][phase] > 0
        assert cell["experiment"]["template"]["name"] == "raw"
        assert cell["rows"] == {"train": 32, "test": 12}


def test_table_shows_speed_and_equality_together(found: dict[str, Any]) -> None:
    text = found["markdown"]
    assert text.count("| training: steps alone, s |") == 2
    assert text.count("| largest difference of the loss, 2 steps |") == 2
    assert "No tweets cell" in text


def test_a_chat_template_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("cells", "equality", "ours", "baseline", "baseline_eval")
    cells, equality, ours, theirs, looks = (
        importlib.import_module(f"benchmarks.{name}") for name in names
    )
    sizes = {"rows": 16, "test_rows": 4, "epochs": 1.0, "max_new_tokens": 3}
    base = cells.tiny_base(tmp_path / "base")
    cell = cells.make_cell("sandbox", "full", base=base, template="chat", **sizes)
    assert equality.same_tokens(cell)
    model = theirs.load(cell, base)
    assert equality.difference(ours.scores(cell, model), looks.scores(cell, model)) < 1e-4
    assert ours.replies(cell, model) == looks.replies(cell, model)


def test_fewer_positions_are_run(found: dict[str, Any]) -> None:
    """A template's opening is run once a batch; the head sees the supervised positions only."""
    ours, theirs = (found["usage"][name]["positions"] for name in ("backfire", "baseline"))
    assert theirs["train"]["body"] >= found["usage"]["tokens"]
    assert ours["train"]["body"] < found["usage"]["tokens"]
    assert theirs["train"]["head"] == theirs["train"]["body"]
    assert ours["train"]["head"] < 0.1 * theirs["train"]["head"]
    assert 4 * ours["scores"]["body"] < theirs["scores"]["body"]
    assert ours["replies"]["body"] < theirs["replies"]["body"]


def test_the_sides_take_turns_at_going_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    clock = importlib.import_module("benchmarks.measure").Clock()
    order: list[str] = []
    work = {name: partial(order.append, name) for name in ("baseline", "backfire")}
    for repetition in range(3):
        clock.alternate("train", repetition, work)
    assert order == ["baseline", "backfire", "backfire", "baseline", "baseline", "backfire"]
    assert all(len(times) == 3 for times in clock.times["train"].values())


def test_variants_of_evaluation_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    cells, evaluation = (
        importlib.import_module(f"benchmarks.{n}") for n in ("cells", "evaluation")
    )
    base = cells.tiny_base(tmp_path / "base")
    sizes = ["--test-rows", "4", "--repetitions", "1"]
    found = evaluation.main(["--base", str(base), *sizes])
    assert set(found["replies, rows"]) == {"4", "16", "32", "64"}
    assert set(found["scores, model"]) == {"float32", "bfloat16", "merged"}
    assert len(found) == 7 and all(time > 0 for one in found.values() for time in one.values())
