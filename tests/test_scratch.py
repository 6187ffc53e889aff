"""Stages that are built on a fast disk of one machine: nothing but progress is lost with it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from backfire import store
from backfire.errors import Stopped
from backfire.store import Store, intact, seal
from tests.helpers.stages import INSIDE, Maker, away, left, once


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BACKFIRE_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.mark.parametrize("resumable", [True, False])
def test_a_stage_is_built_on_the_scratch_disk(resumable: bool, root: Path, scratch: Path) -> None:
    make = Maker()

    def build(folder: Path) -> None:
        assert folder.is_relative_to(scratch)
        (folder / "checkpoints/1").mkdir(parents=True)
        (folder / "checkpoints/1/big.bin").write_bytes(b"big")
        make(folder)

    assert intact(once(root, build, resumable=resumable))
    assert left(root) == ["train", *(f"train/slug-key{part}" for part in INSIDE)]
    assert not [path for path in scratch.rglob("*") if path.is_file()]
    assert once(root, build) and make.calls == 1


def test_a_lost_scratch_disk_costs_progress_only(root: Path, scratch: Path) -> None:
    make = Maker(fail=2)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            once(root, make, resumable=True)
    assert left(root) == ["train"], "nothing half made is in the shared cache"
    shutil.rmtree(scratch)
    assert intact(once(root, make, resumable=True))
    assert make.found == [[], ["a.txt"], []]
    other = Store(root.with_name("other"))
    assert other.scratch != Store(root).scratch, "of another cache"


def trains(folder: Path, steps: int, ends: type[BaseException] | None = None) -> None:
    """A training that goes on from its newest checkpoint and saves some more before it ends."""
    inside = folder / "checkpoints"
    begun = max((int(one.name) for one in inside.glob("0*") if intact(one)), default=0)
    for step in range(begun + 1, begun + steps + 1):
        (place := inside / f"{step:08d}").mkdir(parents=True)
        (place / "weights.bin").write_text(f"{step} after {begun}")
        seal(place)
    (inside / "once.bin").write_text("costly")
    if ends:
        raise ends
    (folder / "a.txt").write_text(f"{begun + steps} steps")


def test_a_stage_that_is_stopped_goes_on_elsewhere(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each host has a scratch disk of its own; the last one has none."""
    shared, hosts = root / "train/slug-key.partial/checkpoints", scratch.parent

    def goes_on(host: int, steps: int, ends: type[BaseException]) -> None:
        monkeypatch.setenv("BACKFIRE_SCRATCH", str(hosts / f"host {host}"))
        with pytest.raises(ends):
            once(root, lambda folder: trains(folder, steps, ends), resumable=True)

    def is_shared(step: int, begun: int) -> bool:
        assert left(shared) == [f"{step:08d}", *_inside(step), "once.bin"], "the newest alone"
        assert (shared / f"{step:08d}/weights.bin").read_text() == f"{step} after {begun}"
        return intact(shared / f"{step:08d}")

    for host, step in ((1, 2), (2, 4), (1, 6)):
        goes_on(host, 2, Stopped)
        assert is_shared(step, step - 2)
    goes_on(1, 2, RuntimeError)
    assert is_shared(6, 4), "who is killed hands nothing over"
    goes_on(1, 1, Stopped)
    assert is_shared(9, 8), "but goes on from what it has"
    for name in ("host 1", ""):
        monkeypatch.setenv("BACKFIRE_SCRATCH", str(hosts / name) if name else "")
        shutil.copytree(root, there := hosts / f"cache of {name}")
        path = once(there, lambda folder: trains(folder, 1), resumable=True)
        assert (path / "a.txt").read_text() == "10 steps" and intact(path)
        assert left(path) == ["a.txt", "done.json"]
        assert not (path.parent / "slug-key.partial").exists()


def _inside(step: int) -> list[str]:
    return [f"{step:08d}/done.json", f"{step:08d}/weights.bin"]


def test_a_stage_that_cannot_be_handed_over_is_stopped_all_the_same(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "copytree", away(shutil.copytree, errno.ENOSPC))
    for ends in (Stopped, None):
        with pytest.raises(ends or OSError):
            once(root, lambda folder, ends=ends: trains(folder, 2, ends), resumable=True)
    assert left(root) == ["train"]


def test_a_full_cache_loses_nothing_on_the_scratch_disk(root: Path, scratch: Path) -> None:
    make = Maker()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(shutil, "copytree", full)
        once(root, make, resumable=True)
    assert left(root) == ["train"]
    once(root, make, resumable=True)
    assert make.found == [[], [*INSIDE_OF_WHOLE]]


INSIDE_OF_WHOLE = ("a.txt", "deep", "done.json")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc here")
def test_all_files_are_on_the_disk_before_the_seal(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where a stage is copied to; also folders, which have the names. A small stage is
    hashed whenever it is read, so there the seal is enough."""
    written, fsync = list[str](), os.fsync

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        written.append(f"{path.relative_to(root.parent).parts[0]} {path.name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    once(root, Maker())
    assert not {"scratch a.txt", "cache a.txt"} & {*written}
    shutil.rmtree(root)
    written.clear()
    monkeypatch.setattr(store, "_HASHED_ON_READ", 4)
    once(root, Maker())
    names = [*map(str.split, written)]
    for disk in ("scratch", "cache"):
        ours = [name for where, name in names if where == disk]
        assert {"a.txt", "b.bin", "deep"} <= {*ours}
    first = [name for where, name in names if where == "scratch"]
    assert max(map(first.index, ("a.txt", "b.bin", "deep"))) < next(
        number for number, name in enumerate(first) if name.startswith(".done.json")
    )
