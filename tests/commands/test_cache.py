"""`backfire cache`: sizes, what a run needs, and pruning that leaves what is needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from backfire import stages
from backfire.commands.cache import KINDS, entries
from backfire.launch import users
from backfire.launch.job import RunFolder
from backfire.plan import Job
from backfire.store import Stage, Store, digest, read_json, write_json
from tests.helpers.command_line import Run
from tests.helpers.small_run import Place
from tests.helpers.workers import SEEDS, ended, planned


def build(stage: Stage, *, days: float = 0, done: bool = True) -> Path:
    """A stage of 1 MB in the cache, last used so many days ago."""
    store = Store()
    if done:
        path = store.once(stage, lambda folder: _write(folder / "model.bin"))
    else:
        path = store.path(stage).with_name(f"{store.path(stage).name}.partial")
        (path / "checkpoints").mkdir(parents=True)
        _write(path / "checkpoints/model.bin")
    for file in (path, *path.rglob("*")):
        then = file.stat().st_mtime - days * 86400
        os.utime(file, (then, then))
    return path


def _write(file: Path) -> None:
    file.write_bytes(bytes(10**6))


def finish(run: Path, jobs: list[Job]) -> None:
    for job in jobs:
        if job.kind == "cell":
            ended(job, RunFolder(run, "r"))


def models(jobs: list[Job]) -> list[Stage]:
    return [stages.train(job.experiment) for job in jobs if job.kind == "train"]


def there(cache: Path) -> set[str]:
    return {str(one.path.relative_to(cache)) for one in entries(Store(cache))}


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Path:
    """A planned run of two cells that nobody has worked on."""
    return tmp_path / "run"


def test_an_empty_cache_is_one_line(backfire: Run, cache: Path) -> None:
    assert backfire("cache").out == f"Cache {cache}: 0 stages, 0.0 MB\n"
    assert "Nothing to remove." in backfire("cache", "prune").out


def test_sizes_by_kind_and_what_a_run_needs(backfire: Run, cache: Path, run: Path) -> None:
    jobs = planned(run)
    for stage in (*models(jobs)[:2], Stage("train", "another", "0" * 12), Stage("odd", "x", "1")):
        build(stage)
    build(models(jobs)[2], done=False)
    output = backfire("cache").out
    assert f"Cache {cache}: 5 stages, 5.0 MB" in output
    assert f"{run}: 0 of 8 cells done" in output
    row = next(line for line in output.splitlines() if line.startswith("train"))
    assert row.split() == ["train", *"trained models and adapters".split(), "3", "1", "4.0", "MB"]
    output = backfire("cache", run).out
    assert f"Needed of the cache {cache}: 3 stages, 3.0 MB" in output and "odd" not in output
    output = backfire("cache", run.parent)
    assert (output.code, output.out) == (2, "") and "not a run that uses this cache" in output.err


def test_pruning_says_what_it_would_do_first(backfire: Run, cache: Path) -> None:
    old, new = Stage("train", "a", "1"), Stage("train", "b", "2")
    build(old, days=40)
    build(new, days=20)
    output = backfire("cache", "prune").out
    assert "Would free: 1 stage, 1.0 MB." in output and "add --yes to remove it" in output
    assert "Would free: 1 stage" in backfire("cache", "prune", "--dry-run", "--yes").out
    assert "Would free: 2 stages" in backfire("cache", "prune", "--older", "10").out
    assert there(cache) == {"train/a-1", "train/b-2"}
    output = backfire("cache", "prune", "--yes").out
    assert "Removing: 1 stage, 1.0 MB." in output and "Freed 1.0 MB." in output
    assert there(cache) == {"train/b-2"} and not (cache / "train/a-1.lock").exists()
    assert Store().done(new) and not Store().done(old)
    assert backfire("cache", "--yes").code == 2


def test_what_an_unfinished_run_needs_stays(backfire: Run, cache: Path, run: Path) -> None:
    jobs = planned(run)
    trained = models(jobs)
    build(trained[0], days=40)
    build(trained[1], days=40, done=False)
    for kind, slug in stages.slugs(jobs[-1].experiment):
        build(Stage(kind, slug, "123456789abc"), days=40)
    build(Stage("train", trained[0].slug, "of another recipe"), days=40)
    before = there(cache)
    output = backfire("cache", "prune", "--older", "0", "--yes").out
    assert f"Kept for {run}: 8 of 8 cells left." in output and "Freed 1.0 MB." in output
    assert before - there(cache) == {f"train/{trained[0].slug}-of another recipe"}
    finish(run, jobs)
    assert "Freed" in backfire("cache", "prune", "--yes", "--keep", run).out
    assert before - there(cache) == {f"train/{trained[0].slug}-of another recipe"}
    assert backfire("cache", "prune", "--keep", run.parent).code == 2
    backfire("cache", "prune", "--yes")
    assert there(cache) == set()


def test_a_run_that_is_not_there_may_be_elsewhere(backfire: Run, cache: Path, run: Path) -> None:
    """Moved, or on another host. It counts as gone after a month, or if it was finished."""
    jobs = planned(run)
    folder = build(models(jobs)[0], days=40)
    [file] = (cache / "runs").iterdir()
    run.rename(moved := run.with_name("moved"))
    assert f"{run}: not there\n" in backfire("cache").out
    output = backfire("cache", "prune", "--older", "0", "--yes").out
    assert f"if it was removed and not moved, remove {file} too." in output and folder.is_dir()
    users.still_uses(moved, read(moved), jobs)
    users.still_uses(moved, read(moved), jobs)
    file.unlink()
    assert f"{moved}: 0 of 8 cells done" in backfire("cache").out
    backfire("cache", "prune", "--older", "0", "--yes")
    assert folder.is_dir(), "it is known at its new place"
    moved.rename(run)
    [file] = (cache / "runs").iterdir()
    os.utime(file, (0, 0))
    assert f"{moved}: gone" in backfire("cache").out
    backfire("cache", "prune", "--yes")
    assert there(cache) == set() and not file.exists()


def test_a_finished_run_that_was_removed_protects_nothing(
    backfire: Run, cache: Path, run: Path
) -> None:
    jobs = planned(run)
    folder = build(models(jobs)[0], days=40)
    finish(run, jobs)
    users.has_finished(run)
    shutil.rmtree(run)
    backfire("cache", "prune", "--yes")
    assert not folder.exists() and not [*(cache / "runs").iterdir()]
    users.has_finished(run)
    assert not [*(cache / "runs").iterdir()]


def test_a_run_of_the_same_path_on_another_host_is_another_run(
    backfire: Run, cache: Path, run: Path
) -> None:
    """On disks of their own: what the unfinished one needs stays, whatever the other one is."""
    jobs = planned(run, SEEDS, "data.rows=50")
    folder = build(models(jobs)[0], days=40)
    run.rename(run.with_name("on another host"))
    others = planned(run)
    finish(run, others)
    users.has_finished(run)
    assert len([*(cache / "runs").iterdir()]) == 2
    output = backfire("cache", "prune", "--older", "0", "--yes").out
    assert f"Kept for {run}: it was unfinished when" in output and folder.is_dir()
    named = [run.with_name("on another host"), run]
    assert len({users._id_of(one) for one in named}) == 2
    assert users._id_of(run) == (planned(run), users._id_of(run))[1], "a second plan keeps it"


def test_a_run_of_an_earlier_version_has_no_id(cache: Path, run: Path) -> None:
    jobs = planned(run)
    content = read_json(run / "run.json")
    write_json(run / "run.json", {key: content[key] for key in content if key != "id"})
    for file in (cache / "runs").iterdir():
        file.unlink()
    users.register(run, read(run), jobs)
    [user] = users.users(cache)
    assert (user.file.stem, user.id) == (digest(str(run)), "") and user.is_here


def test_every_kind_of_stage_is_needed_by_somebody(cache: Path, run: Path) -> None:
    needed = {need.partition("/")[0] for need in users.needs_of(planned(run))}
    assert needed == {*KINDS}


def test_what_a_run_needs_must_be_known(backfire: Run, cache: Path, run: Path) -> None:
    planned(run)
    [file] = (cache / "runs").iterdir()
    file.write_text("{")
    output = backfire("cache", "prune", "--yes")
    assert output.code == 2 and "what its run needs is unknown" in output.err


def test_what_is_being_built_stays(backfire: Run, cache: Path) -> None:
    build(locked := Stage("train", "a", "1"), days=40)
    build(Stage("train", "b", "2"), days=40, done=False)
    build(Stage("train", "c", "3"), done=False)
    with FileLock(f"{Store().path(locked)}.lock"):
        assert "Freed 1.0 MB." in backfire("cache", "prune", "--older", "0", "--yes").out
    assert there(cache) == {"train/a-1", "train/c-3.partial"}


def test_parts_of_a_run_add_up(run: Path, cache: Path) -> None:
    every = planned(run)
    [user] = users.users(cache)
    stamp = user.file.stat().st_mtime_ns
    users.register(run, read(run), every[-3:])
    assert users.users(cache) == [user] and user.file.stat().st_mtime_ns == stamp
    users.register(run, "another recipe", every[-3:])
    assert users.users(cache)[0].needs < user.needs


def read(run: Path) -> str:
    return (run / "recipe.yaml").read_text()


def test_the_scratch_disk_is_part_of_it(
    backfire: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKFIRE_SCRATCH", str(tmp_path / "scratch"))
    place = Store().scratch / "train/a-1.partial"
    place.mkdir(parents=True)
    _write(place / "half.bin")
    for path in (place, place / "half.bin"):
        os.utime(path, (0, 0))
    assert "1 stage, 1.0 MB" in backfire("cache").out
    assert "Freed 1.0 MB." in backfire("cache", "prune", "--yes").out
    assert not place.exists()


@pytest.mark.slow
def test_all_that_a_run_makes_is_needed_by_it(ran: Place) -> None:
    [user] = users.users(ran.cache)
    made = list(entries(Store(ran.cache)))
    assert {one.kind for one in made} >= {"data", "poison", "preflight", "train", "evaluate"}
    assert [one.path for one in made if not user.needs_stage(one.kind, one.name)] == []
    assert all(one.is_done for one in made) and user.cells() == (6, 6)
