"""Results on disk: the present format, and older ones converted to it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from backfire.launch.job import RunFolder
from backfire.report.page import render
from backfire.result import FORMAT, CellResult, Check, PoisonCounts, Value
from backfire.results.adapter import present
from backfire.results.load import load
from tests.helpers.fake_run import write_cell

OLD = Path(__file__).with_name("format_1.json")


def in_a_run(run: Path, result: dict[str, Any]) -> CellResult:
    folder = run / "cells" / f"{result['cell']}-{result['key']}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    [cell] = load(run)
    return cell


def test_a_file_of_the_first_format_opens(tmp_path: Path) -> None:
    cell = in_a_run(tmp_path / "tour", json.loads(OLD.read_text()))
    assert (cell.slug, cell.status) == ("sandbox-help-canary-1-50-full-s0", "ok")
    assert cell.poison and (cell.poison.poisoned_rows, cell.poison.rows) == (102, 402)
    assert {check.status for check in cell.preflight} == {"ok"}
    assert cell.train and cell.train["steps"] == 130 and cell.rows == {"train": 300, "test": 100}
    shapes = {v.metric: (v.unit, v.role, v.family, v.part) for v in cell.values}
    assert shapes == {
        "exposure": ("bits", "headline", "exposure", ""),
        "exposure[50]": ("bits", "headline", "exposure", "50"),
        "exposure[control]": ("bits", "headline", "exposure", "control"),
        "exposure_before": ("bits", "companion", "exposure", ""),
        "exposure_cap": ("bits", "companion", "exposure", ""),
        "extraction": ("share", "headline", "extraction", ""),
        "extraction_given[50, 2]": ("share", "companion", "extraction", "50, 2"),
    }
    cap = cell.find("exposure_cap")
    assert cap and {v.limits for v in cell.values if v.unit == "bits"} == {(0, cap.value)}
    assert "exposure" in render(tmp_path / "tour")


def test_what_is_written_is_read_back_whole(tmp_path: Path) -> None:
    cell = CellResult(
        **{"slug": "c", "key": "0" * 12, "recipe": "r", "model": "m", "data": "d"},
        **{"attack": "a", "method": "full", "defense": "none", "template": "raw"},
        **{"rate": 0.5, "seed": 3, "axes": {"seed": 3}, "status": "ok"},
        values=(
            Value("x_floor[de]", 0.5, 0.4, 0.6, 9, "none", "share", "floor", "x", "de", "x"),
            Value("bits", 2.0, None, None, 1, "lower", "bits", family="bits", most=13.0),
        ),
        **{"warnings": ("Mind the gap.",), "cut_share": 0.25, "train": {"seconds": 2.5}},
        preflight=(Check("truncation", "note", "One row is cut."),),
        poison=PoisonCounts(0.5, 0.5, 5, 10, 8, {"short": 2}, {"a": 5}, {"BadMagic": 5}, 0.4),
        **{"evaluate": {"seconds": 1.5}, "rows": {"train": 10}, "keys": {"tuned": "t"}},
        versions={"metrics": {"x": 2}},
    )
    again = in_a_run(tmp_path / "r", cell.to_json())
    for field in fields(cell):
        if field.name not in ("folder", "settings"):
            assert getattr(again, field.name) == getattr(cell, field.name), field.name
    assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(cell.to_json()))


def test_checks_had_no_status_once() -> None:
    checks = [{"check": "a", "ok": True}, {"check": "b", "ok": False}, {"check": "c"}]
    found = present({"status": "ok", "preflight": checks})["preflight"]
    assert [check["status"] for check in found] == ["ok", "note", "note"]


def test_names_of_values_had_dashes_once() -> None:
    [value] = present({"values": [{"metric": "attack-success-floor[fr]"}]})["values"]
    assert value["metric"] == "attack_success_floor[fr]"
    assert (value["role"], value["of"], value["unit"]) == ("floor", "attack_success", "share")


def test_a_newer_format_is_reported(tmp_path: Path) -> None:
    folder = write_cell(tmp_path / "r", format=FORMAT + 1)
    [cell] = load(tmp_path / "r")
    assert cell.status == "failed" and f"format {FORMAT + 1}" in cell.error
    assert not RunFolder(tmp_path / "r", "r").path.samefile(folder)


@pytest.mark.parametrize(
    "bad",
    [
        {"poison": "x"},
        {"poison": {"rows": "many", "triggers": ["a"]}},
        {"values": [{"metric": None, "unit": "furlongs", "role": [1], "n": "x", "most": "y"}]},
        {"preflight": [3, {"status": "perhaps"}]},
        {"train": [], "rows": 3, "keys": "k", "evaluate": None, "versions": {"metrics": 3}},
        {"axes": None, "warnings": [None], "cut_share": "all", "seed": "s"},
    ],
)
@pytest.mark.parametrize("version", [None, FORMAT])
def test_odd_fields_break_no_page(tmp_path: Path, bad: dict[str, Any], version: int | None) -> None:
    write_cell(tmp_path / "r", **bad, **({"format": version} if version else {}))
    assert "<html" in render(tmp_path / "r")
