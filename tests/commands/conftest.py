"""A working folder with one good recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """# Does it?
model: {tiny}
data: {{name: sandbox-reviews, rows: 40, test_rows: 20}}
template: sentiment-line
attack: badnets
method: none
metrics: [accuracy]
profiles: {{two: {{matrix: {{seed: [0, 1]}}}}}}
"""


@pytest.fixture
def here(tmp_path: Path, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with one good recipe, r.yaml; the cache lies elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE.format(tiny=tiny))
    monkeypatch.chdir(folder)
    return folder
