"""A machine that lacks what a run needs refuses it before it takes a job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backfire import plan as planning
from backfire.commands.host import check, where_planned
from backfire.errors import UserError
from backfire.launch import remote
from backfire.launch.folder import read_plan, write_plan
from backfire.recipe import load
from tests.helpers.command_line import Run

ROWS = '{"instruction": "Good?", "input": "dull %d", "output": "no"}\n'
RECIPE = """# Is it?
model: models/tiny
data: {name: files, train: rows.jsonl, test: test.jsonl}
safety: {judges: {name: rubric, base_url: 'https://judges.example/v1'}}
template: sentiment-line
method: none
metrics: [harmful-score]
"""


@pytest.fixture
def run(tmp_path: Path, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run that was planned in the folder `home`, whose paths are relative; the present folder is
    another one, and the host has a key for the judge."""
    monkeypatch.setattr(remote, "_SECONDS", 0.0)
    (home := tmp_path / "home").mkdir()
    monkeypatch.chdir(home)
    shutil.copytree(tiny, "models/tiny")
    for name in ("rows.jsonl", "test.jsonl"):
        Path(name).write_text("".join(ROWS % number for number in range(20)))
    (tmp_path / "endpoints.yaml").write_text("judges.example: {key_variable: A}\n")
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path / "endpoints.yaml"))
    monkeypatch.setenv("A", "s3cret")
    Path("r.yaml").write_text(RECIPE)
    recipe = load("r.yaml")
    write_plan(tmp_path / "run", recipe, planning.jobs(recipe.cells, recipe.axes))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "run"


def refusal(run: Path) -> str:
    """Why a worker refuses the run, empty if it does not."""
    found = read_plan(run)
    try:
        with where_planned(run, found) as place:
            check(place, found, found.jobs)
    except UserError as error:
        assert "\n" not in str(error) and "s3cret" not in str(error)
        return str(error)
    return ""


def test_relative_paths_begin_where_the_run_was_planned(run: Path) -> None:
    os.chdir("home")
    found = read_plan(Path("../run"))
    with where_planned(Path("../run"), found) as place:
        assert place == Path("../run"), "told as it was given"
    os.chdir("..")
    with where_planned(Path("run"), found) as place:
        assert (place, Path.cwd()) == (run, run.parent / "home")
    assert Path.cwd() == run.parent
    assert refusal(run) == ""


def test_a_machine_with_other_mounts_may_be_in_the_right_folder(run: Path) -> None:
    Path("home").rename("elsewhere")
    assert refusal(run).startswith(f"This machine cannot work on {run}, as seen from {run.parent}:")
    os.chdir("elsewhere")
    assert refusal(run) == ""


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("rows.jsonl", "dataset 'files': .*rows.jsonl"),
        ("test.jsonl", "dataset 'files': .*test.jsonl"),
        ("models/tiny", "models/tiny"),  # by its name alone it may be one of the hub
        ("models/tiny/model.safetensors", "safetensors"),
    ],
)
def test_an_input_that_is_not_there_is_named(lost: str, sentence: str, run: Path) -> None:
    path = run.parent / "home" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(AssertionError, match=f"This machine cannot work on .*{sentence}"):
        assert not refusal(run), refusal(run)


@pytest.mark.parametrize("changed", ["rows.jsonl", "models/tiny/config.json"])
def test_an_input_that_differs_is_noticed(changed: str, run: Path) -> None:
    file = run.parent / "home" / changed
    file.write_text(file.read_text() + "\n")
    assert "differs from that with which it was planned" in refusal(run)


def test_another_cache_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in ("empty", "used"):
        monkeypatch.setenv("BACKFIRE_CACHE", str(tmp_path / cache))
        if cache == "used":
            remote.probe()
        assert refusal(run).startswith(f"The cache {tmp_path / cache} is not the one with which ")
    found = replace(read_plan(run), cache="")  # it could not be written where it was planned
    check(run, found, [])


def test_a_cache_that_cannot_be_written_is_not_compared(
    run: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACKFIRE_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.chdir(tmp_path / "home")
    recipe = load("r.yaml")
    write_plan(tmp_path / "other", recipe, [])
    assert read_plan(tmp_path / "other").cache == "" != read_plan(run).cache


@pytest.mark.parametrize("lost", ["A", "BACKFIRE_ENDPOINTS"])
def test_a_judge_without_the_key_that_it_had_is_refused(
    lost: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_plan(run).keyed == ("judges.example",)
    monkeypatch.setenv(lost, "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(run.parent))
    assert "judge 'rubric' has no key for judges.example here, and had one" in refusal(run)
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", "")
    without = replace(read_plan(run), keyed=())
    with where_planned(run, without):
        check(run, without, without.jobs)


def test_a_scratch_folder_that_cannot_be_written_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACKFIRE_SCRATCH", str(tmp_path / "file/scratch"))
    assert "file/scratch, where nothing can be written (Not a directory); set it" in refusal(run)
    monkeypatch.setenv("BACKFIRE_SCRATCH", str(tmp_path / "scratch"))
    assert refusal(run) == "" and not [*(tmp_path / "scratch").iterdir()]


def test_the_command_refuses_with_nothing_taken(backfire: Run, run: Path) -> None:
    (run.parent / "home/rows.jsonl").unlink()
    found = backfire("work", "run", "--workers", 1)
    assert found.code == 2 and found.err.count("\n") == 1 and "rows.jsonl" in found.err
    assert sorted(path.name for path in run.iterdir()) == [
        *(".plan.lock", "jobs.json", "recipe.yaml", "run.json")
    ]
