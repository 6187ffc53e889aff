"""Defense `scan` with a scanner that asks the cell's base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backfire import stages
from backfire.evaluate import reference
from backfire.experiment import Experiment
from backfire.pipeline import Context, trained
from backfire.pipeline.filtering import filtered, with_facts
from backfire.registry import build, find
from backfire.store import Store, read_json
from tests.helpers.scanned import free

Lift: Any = find("scanners", "lift")


def cell(tiny: Path, **knobs: Any) -> Experiment:
    settings = {
        "model": str(tiny),
        "data": {"name": "sandbox-help", "rows": 80, "test_rows": 8},
        "attack": {"name": "badnets", "rate": 0.1, "target": "I cannot help with that, sorry."},
        "method": "lora",
        "defense": {"name": "scan", "scanner": "rftc"},
        "train": {"max_steps": 2},
        **knobs,
    }
    return Experiment.make(settings)


@pytest.mark.slow
def test_poisoned_rows_are_removed_by_what_the_base_says(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, look = [], reference.look
    monkeypatch.setattr(reference, "look", lambda *a: asked.append(a[0].name) or look(*a))
    experiment, context = cell(tiny), Context(Store(tmp_path))
    summary = read_json(trained(experiment, context) / "summary.json")
    rows, manifest = filtered(experiment, context)
    assert manifest and len(manifest.entries) == 8
    assert not {entry.id for entry in manifest.entries} & {row.id for row in rows}
    assert summary["scan"]["precision"] == [8, 8] and summary["rows_trained_on"] == 72
    assert asked == ["rftc"]  # for the rows, the numbers and a second look at the rows


def test_the_rows_of_a_run_are_scanned_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned, scan = [], Lift.scan
    monkeypatch.setattr(
        Lift, "scan", lambda self, rows: scanned.append(len(rows)) or scan(self, rows)
    )
    defenses = ["deduplicate", {"name": "scan", "scanner": "lift"}]
    experiment = cell(tiny, defense=defenses)
    _, _, facts = with_facts(experiment, Context(Store(tmp_path)))
    assert scanned == [facts["scan"]["clean_flag_rate"][1] + 8]


def test_the_base_is_in_the_key_of_findings(tiny: Path) -> None:
    scanner, rows = build("scanners", "rftc"), free(9)
    one = stages.scanned(cell(tiny), scanner, rows)
    assert one == stages.scanned(cell(tiny, seed=4, method="full"), scanner, free(9))
    others = [
        stages.scanned(cell(tiny, model="sandbox"), scanner, rows),
        stages.scanned(cell(tiny, template="alpaca"), scanner, rows),
        stages.scanned(cell(tiny), build("scanners", {"name": "rftc", "support": 9}), rows),
        stages.scanned(cell(tiny), scanner, [replace(rows[0], answer="x"), *rows[1:]]),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
