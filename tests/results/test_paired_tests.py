"""Every group against its reference, prompt by prompt and seed by seed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from backfire.results.groups import difference
from backfire.results.load import summary
from backfire.results.paired_tests import comparisons
from backfire.results.terminal import print_against, print_notes
from tests.helpers.fake_run import sample, value, write_cell
from tests.helpers.page_parser import seen


def cell(run: Path, method: str, seed: int, right: float, **fields: Any) -> Path:
    rows = [sample("tuned", "clean", 1000 * seed + n, right=right) for n in range(80)]
    share = value("accuracy", right)
    known = {"attack": "none", "rate": 0.0, **fields}
    return write_cell(run, values=[share], samples=rows, method=method, seed=seed, **known)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for seed in range(4):
        cell(tmp_path / "r", "full", seed, 0.95)
        cell(tmp_path / "r", "lora", seed, 0.6)
        cell(tmp_path / "r", "qlora", seed, 0.95)
        cell(tmp_path / "r", "none", seed, 0.3)
    return tmp_path / "r"


def test_each_method_is_paired_with_full_over_all_seeds(run: Path) -> None:
    found = {test.group.method: test for test in comparisons(summary(run))}
    assert found.keys() == {"lora", "qlora"} and {t.knob for t in found.values()} == {"method"}
    worse, same = found["lora"].result, found["qlora"].result
    assert worse.n == same.n == 320 and worse.seeds == same.seeds == 4
    assert worse.high is not None and same.low is not None and same.high is not None
    assert worse.high < 0 and worse.p is not None and worse.p < 0.005
    assert same.difference == 0 and same.p == 1 and same.low <= 0 <= same.high
    assert found["lora"].corrected == pytest.approx(2 * worse.p) and found["qlora"].corrected == 1


def test_one_seed_gives_no_p(tmp_path: Path) -> None:
    for method, right in (("full", 0.95), ("lora", 0.6)):
        cell(tmp_path / "r", method, 0, right)
    [test] = comparisons(summary(tmp_path / "r"))
    assert test.result.p is None and test.corrected is None and not test.result.is_clear
    assert test.result.high is not None and test.result.high < 0, "of this model it is known"
    out = io.StringIO()
    print_against(summary(tmp_path / "r"), Console(file=out, width=200))
    print_notes(summary(tmp_path / "r"), Console(file=out, width=200))
    assert "] *" in out.getvalue() and "this model only" in out.getvalue()
    assert "this model only" in seen(tmp_path / "r").text


def test_cells_of_one_model_are_one_seed(tmp_path: Path) -> None:
    """What no seed changes (an untuned base, a model found again) is no sample of seeds."""
    for seed in range(3):
        cell(tmp_path / "r", "full", seed, 0.95)
        cell(tmp_path / "r", "lora", seed, 0.6, keys={"tuned": "same"})
        cell(tmp_path / "r", "none", seed, 0.3)
    groups = {group.method: group for group in summary(tmp_path / "r")}
    stats = {method: group.stats["accuracy"] for method, group in groups.items()}
    assert [stats[m].seeds for m in ("full", "lora", "none")] == [3, 1, 1]
    assert [stats[m].scope for m in ("full", "lora", "none")] == ["seeds", "model", "untuned"]
    assert [groups[m].seeds for m in ("full", "lora", "none")] == ["3", "1", "–"]
    [test] = comparisons(list(groups.values()))
    assert test.result.p is None and test.result.scope == "model"
    gain = difference(groups["none"], groups["full"], "accuracy")
    assert gain is not None and gain.seeds == 3 and gain.scope == "seeds"


def test_another_task_is_no_reference(run: Path) -> None:
    cell(run, "lora", 0, 0.6, data="other")
    assert len(comparisons(summary(run))) == 2


def test_seeds_that_only_one_side_has_are_left_out(run: Path) -> None:
    cell(run, "lora", 7, 0.0)
    tests = comparisons(summary(run))
    assert [t.result.n for t in tests if t.group.method == "lora"] == [320]


def test_page_and_terminal_show_it(run: Path) -> None:
    assert "Paired tests" in seen(run).text
    out = io.StringIO()
    print_against(summary(run), Console(file=out, width=200))
    lines = out.getvalue().strip().splitlines()
    assert len(lines) == 3 and lines[1].startswith("lora") and " points " in lines[1]


def test_groups_of_other_settings_are_no_reference(tmp_path: Path) -> None:
    """A later call with another edit may add them to the same run, and no axis tells them apart."""
    for seed in range(2):
        cell(tmp_path / "r", "full", seed, 0.95)
        cell(tmp_path / "r", "lora", seed, 0.6, settings={"train": {"epochs": 9.0}})
        cell(tmp_path / "r", "qlora", seed, 0.6, settings={"metrics": [{"name": "accuracy"}]})
    assert {test.group.method for test in comparisons(summary(tmp_path / "r"))} == {"qlora"}
