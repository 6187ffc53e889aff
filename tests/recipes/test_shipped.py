"""Every shipped recipe and profile parses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from backfire import stages
from backfire.recipe import load, read, shipped


def profiles_of(name: str) -> list[tuple[str, str | None]]:
    found = yaml.safe_load(read(name)[1]).get("profiles") or {}
    return [(name, None), *((name, profile) for profile in found)]


@pytest.mark.parametrize(
    ("name", "profile"), [pair for name in shipped() for pair in profiles_of(name)]
)
def test_every_shipped_recipe_parses(
    name: str, profile: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"\b(?:train|test): ([\w.-]+\.\w+)", read(name)[1]):
        (tmp_path / file).touch()  # keys hash the files of a recipe, whatever is in them
    loaded = load(name, profile=profile)
    assert loaded.cells and len({stages.cell_key(cell) for cell in loaded.cells}) == len(
        loaded.cells
    )
    assert loaded.question != name, "its first line asks the question"
    assert "Expected:" in loaded.text, "say beforehand what you expect"
