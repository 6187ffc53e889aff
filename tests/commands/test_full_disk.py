"""A disk that is full, and folders that cannot be written: one sentence, and nothing is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from backfire.launch import folder
from backfire.store import intact
from tests.helpers.command_line import Run, tree
from tests.torture import mounts
from tests.torture.cell import Say
from tests.torture.child import Child
from tests.torture.command import command_line
from tests.torture.row import NotHere

RECIPE = """# Does it fit?
model: {tiny}
data: {{name: sandbox-reviews, rows: 40, test_rows: 8}}
template: sentiment-line
method: full
train: {{max_steps: 3, batch_size: 8}}
matrix: {{seed: [0, 1, 2]}}
metrics: [accuracy]
"""


def on_small_disk(say: Say, root: Path, tiny: Path) -> dict[str, Any]:
    """Run a recipe on a disk that holds one tuned model of three, and again on a large one."""
    weights = (tiny / "model.safetensors").stat().st_size
    try:
        mounts.alone()
        mounts.memory_disk(root, 5 * weights // 2 + 2**17)
    except NotHere as lacking:
        return {"lacks": str(lacking)}
    (root / "r.yaml").write_text(RECIPE.format(tiny=tiny))
    line = ["run", "r.yaml", "--workers", "1", "--out", "run"]
    first, kept = command_line(root, line), list(root.glob("cache/train/*[!l]/done.json"))
    sound = all(intact(seal.parent) for seal in kept)
    dates = [seal.stat().st_mtime_ns for seal in kept]
    status = command_line(root, ["status", "run"])
    mounts.memory_disk(root, 2**28, again=True)
    second = command_line(root, line)
    same = dates == [seal.stat().st_mtime_ns for seal in kept]
    return {"first": first, "status": status, "second": second, "kept": kept, "sound": sound & same}


@pytest.mark.slow
def test_the_same_command_goes_on_once_there_is_space(tmp_path: Path, tiny: Path) -> None:
    found = Child(on_small_disk, tmp_path, tiny).result()
    if "lacks" in found:
        pytest.skip(found["lacks"])
    first, last = found["first"], found["first"]["printed"].splitlines()[-1]
    assert first["code"] == 2 and not first["traceback"]
    assert last.startswith("backfire: The disk is full, or a quota: there are 0 MB for the run (r")
    assert last.endswith("run the same command again; finished stages are kept.")
    assert found["sound"] and 0 < len(found["kept"]) < 3
    assert "unfinished: " in found["status"]["printed"]
    assert found["second"]["code"] == 0, found["second"]["printed"]


def test_a_folder_that_cannot_be_written_is_refused_first(
    backfire: Run, here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("")
    before = tree(here)

    def refused(*words: object) -> str:
        for verb in ("run", "plan"):
            output = backfire(verb, "r.yaml", *words)
            assert (output.code, output.err.count("\n")) == (2, 1) and tree(here) == before
        return output.err

    sentence = "The run folder {} cannot be written: {} is a file; choose another --out.\n"
    assert sentence.format("file/x", here / "file") in refused("--out", "file/x")
    assert sentence.format("file", "file") in refused("--out", "file")
    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "access", lambda place, mode: Path(place) != here)
        assert f"folder new cannot be written: {here} is read-only" in refused("--out", "new")
        patch.setattr(folder.os, "access", lambda place, mode: Path(place) == here)
        assert f"The cache {cache} cannot be written: {cache.parent} is read-only for" in refused()
    monkeypatch.setenv("BACKFIRE_CACHE", str(here / "file"))
    assert "set BACKFIRE_CACHE to another folder." in refused()
    assert os.access(here, os.W_OK)
