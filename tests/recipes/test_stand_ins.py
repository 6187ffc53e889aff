"""Every recipe for a real model runs end to end: one cell of each profile, with two-layer models of
the same settings and files with the same columns in place of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from backfire.experiment import Experiment
from backfire.recipe import load, read, shipped
from backfire.store import read_json
from tests.helpers.command_line import Run
from tests.helpers.stage_keys import FILES
from tests.helpers.stand_ins import small
from tests.helpers.tiny_classifier import write_classifier

pytestmark = pytest.mark.slow


def real_profiles() -> list[tuple[str, str]]:
    """Recipe and profile of every profile whose model is on the hub."""
    found = []
    for name in shipped():
        for profile, settings in (yaml.safe_load(read(name)[1]).get("profiles") or {}).items():
            model = settings.get("model") or "sandbox"
            hub_id = model if isinstance(model, str) else model["name"]
            found += [(name, profile)] if "/" in hub_id else []
    return found


def hardest(cells: tuple[Experiment, ...]) -> Experiment:
    """A cell that trains, with as much else in it as the profile has."""
    return max(cells, key=lambda cell: (cell.method.trains, bool(cell.defense), cell.rate))


@pytest.mark.parametrize(("name", "profile"), real_profiles())
def test_one_cell_of_every_profile_for_a_real_model(
    name: str,
    profile: str,
    backfire: Run,
    tiny_tokenizer: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        Path(file).touch()
    cell = hardest(load(name, profile=profile).cells)
    classifier = write_classifier(tmp_path / "classifier", tiny_tokenizer, num_positions=514)
    recipe = tmp_path / "one.yaml"
    recipe.write_text(yaml.safe_dump(small(cell, tmp_path, classifier)), encoding="utf-8")
    output = backfire("run", recipe, "--out", tmp_path / "out", "--workers", 1)
    assert output.code == 0, output.err
    [folder] = (tmp_path / "out" / "cells").iterdir()
    result = read_json(folder / "result.json")
    assert result["train"]["steps"] == 2 and result["values"]
    assert not [check for check in result["preflight"] if check["status"] == "fail"]
    if cell.attack and cell.rate:
        assert result["poison"]["poisoned_rows"] > 0
    assert (tmp_path / "out" / "report.html").is_file()
