"""Stages are complete or absent, files are old or new, and names stay inside their folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from backfire import patience, store
from backfire.data.jsonl import read_jsonl
from backfire.store import (
    Stage,
    Store,
    cache_root,
    intact,
    last_change,
    read_json,
    seal,
    stats_of,
    write_atomic,
    write_json,
)
from tests.helpers.patience import LONG
from tests.helpers.stages import INSIDE, NAMES, Maker, away, left, once


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_stage_is_made_once(root: Path) -> None:
    make = Maker()
    folder = once(root, make)
    assert folder == root / "train" / "slug-key"
    assert once(root, make) == folder and make.calls == 1
    assert set(read_json(folder / "done.json")) == set(NAMES)
    assert Store(root).done(Stage("train", "slug", "key"))
    assert not Store(root).done(Stage("train", "slug", "other"))
    assert Store(root).once(Stage("poison", "slug", "key"), make) != folder and make.calls == 2


def test_a_stage_is_read_through_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files may be large: not by whoever made it, and once by others."""
    read, stage = list[Path](), Stage("train", "slug", "key")
    monkeypatch.setattr(store, "intact", lambda folder: read.append(folder) or intact(folder))
    own, other = Store(root), Store(root)
    own.once(stage, Maker())
    read.clear()
    assert own.done(stage) and not read
    assert other.done(stage) and other.done(stage) and len(read) == 1


def test_a_half_made_stage_is_not_there(root: Path) -> None:
    make = Maker(fail=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            once(root, make)
        assert not (root / "train/slug-key").exists()
        assert not Store(root).done(Stage("train", "slug", "key"))
    assert intact(once(root, make))
    assert make.found == [[], [], []], "each attempt starts empty"
    assert not (root / "train/slug-key.partial").exists()


def test_a_resumable_stage_hands_over_what_was_left(root: Path) -> None:
    make = Maker(fail=1)
    with pytest.raises(RuntimeError):
        once(root, make, resumable=True)
    once(root, make, resumable=True)
    assert make.found == [[], ["a.txt"]]


def test_checkpoints_go_only_once_all_is_whole(root: Path) -> None:
    """Whatever a kill leaves before that can go on from them."""

    def make(folder: Path) -> None:
        (folder / "a.txt").write_text("a")
        (folder / "checkpoints/7").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints/7/b.txt").write_text("b")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "seal", Maker(fail=9))
        with pytest.raises(RuntimeError):
            once(root, make, resumable=True)
    assert (root / "train/slug-key.partial/checkpoints/7/b.txt").is_file()
    path = once(root, make, resumable=True)
    assert sorted(p.name for p in path.iterdir()) == ["a.txt", "done.json"] and intact(path)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [truncate, empty, flip, grow, Path.unlink])
@pytest.mark.parametrize("name", [*NAMES, "done.json"])
def test_damage_is_detected_and_repaired(
    name: str, damage: Callable[[Path], None], root: Path
) -> None:
    make = Maker()
    folder = once(root, make)
    damage(folder / name)
    assert not intact(folder)
    assert not Store(root).done(Stage("train", "slug", "key"))
    assert folder.is_dir(), "to look is not to touch"
    assert intact(once(root, make)) and make.calls == 2
    # The damaged folder is kept for inspection, and does not prevent another one.
    assert (folder.parent / "slug-key.damaged").is_dir()
    damage(folder / name)
    assert intact(once(root, make)) and make.calls == 3


STRANGE = ["", "[]", "3", "{", '{"a.txt": 3}', '{"a.txt": {"bytes": "5"}}', "\xff"]


@pytest.mark.parametrize("content", STRANGE)
def test_a_malformed_seal_is_no_seal(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole")
    (tmp_path / "done.json").write_bytes(content.encode("latin-1"))
    assert not intact(tmp_path)


def test_every_single_bit_of_a_seal_counts_or_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole")
    seal(tmp_path)
    good, value = (tmp_path / "done.json").read_bytes(), read_json(tmp_path / "done.json")
    for bit in range(0, 8 * len(good), 5):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "done.json").write_bytes(bad)
        assert not intact(tmp_path) or json.loads(bad) == value


def test_large_files_may_be_sealed_without_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("whole")
    seal(tmp_path, hash_large=False)
    assert "sha256" in read_json(tmp_path / "done.json")["a.txt"]
    monkeypatch.setattr(store, "_HASHED_ON_READ", 4)
    for hash_large in (True, False):
        seal(tmp_path, hash_large=hash_large)
        assert ("sha256" in read_json(tmp_path / "done.json")["a.txt"]) == hash_large
        assert intact(tmp_path)
    (tmp_path / "a.txt").write_text("part")
    assert not intact(tmp_path)


def test_the_second_caller_waits_for_the_first(root: Path) -> None:
    begun, go_on, order = threading.Event(), threading.Event(), list[str]()

    def slow(folder: Path) -> None:
        begun.set()
        assert go_on.wait(LONG)
        order.append("made")
        (folder / "a.txt").write_text("first")

    def second() -> None:
        folder = once(root, Maker())
        order.append((folder / "a.txt").read_text())

    threads = [threading.Thread(target=once, args=(root, slow)), threading.Thread(target=second)]
    threads[0].start()
    assert begun.wait(LONG)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and order == []
    go_on.set()
    for thread in threads:
        thread.join(LONG)
    assert order == ["made", "first"]


def test_many_callers_make_it_once(root: Path) -> None:
    make = Maker()
    threads = [threading.Thread(target=once, args=(root, make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert make.calls == 1


# -------------------------------------------------------------------------- other hosts, scratch


def test_names_differ_between_hosts_and_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # of every container
    names = {store.unique() for _ in range(100)}
    monkeypatch.setattr(socket, "gethostname", lambda: "node 7.cluster/x" + 300 * "y")
    there = store.unique()
    assert len(names) == 100 and there not in names and len(there) < 60
    assert there.startswith("node-7-cluster-x") and there.count(".") == 2


def test_an_attempt_that_fails_leaves_nothing(root: Path) -> None:
    with pytest.raises(RuntimeError):
        once(root, Maker(fail=1))
    assert left(root) == ["train"]


def test_what_killed_attempts_leave_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, here = root / "train/slug-key.partial", store.unique()
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: False)
    for name in (here, "other.1.00000000", "other.2.00000000"):
        (place / name).mkdir(parents=True)
        (place / name / "half.bin").write_bytes(b"half")
    for path in (place / "other.1.00000000", place / "other.1.00000000/half.bin"):
        os.utime(path, (0, 0))
    folder = once(root, Maker())
    assert intact(folder) and left(place) == ["other.2.00000000", "other.2.00000000/half.bin"]


def test_attempts_in_a_container_of_the_same_host_name_stay(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the network of its host it has the host's name too, and numbers its processes anew."""
    with pytest.MonkeyPatch.context() as there:
        there.setattr(store, "place_of_processes", lambda: "0123456789ab")
        other = store.unique()
    (root / "train/slug-key.partial" / other).mkdir(parents=True)
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: False)
    once(root, Maker())
    assert left(root / "train/slug-key.partial") == [other]


def test_a_temporary_folder_is_of_one_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, place = Stage("merge", "slug", "key"), root / "merge/slug-key.partial"
    with Store(root).temporary(stage) as one, Store(root).temporary(stage) as other:
        assert one != other and one.parent == other.parent == place
        assert not Store(root).done(stage)
    assert left(root) == ["merge"]
    (place / f"{store.unique()}").mkdir(parents=True)
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: False)
    with Store(root).temporary(stage) as one:
        assert list(place.iterdir()) == [one], "what a killed process left is removed"


def test_the_faster_of_two_hosts_wins(root: Path) -> None:
    """Where neither sees the other's lock."""

    def slow(folder: Path) -> None:
        (folder / "a.txt").write_text("slow")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "locked", lambda *_, **__: contextlib.nullcontext())
            patch.setattr(socket, "gethostname", lambda: "other")
            once(root, Maker())

    assert (once(root, slow) / "a.txt").read_text() == "whole"
    assert left(root) == ["train", *(f"train/slug-key{part}" for part in INSIDE)]


def test_the_date_of_a_seal_is_that_of_its_last_use(root: Path) -> None:
    seal_file = once(root, Maker()) / "done.json"
    recent = seal_file.stat().st_mtime_ns
    assert Store(root).done(Stage("train", "slug", "key"))
    assert seal_file.stat().st_mtime_ns == recent, "one write an hour is enough"
    os.utime(seal_file, (0, 0))
    assert Store(root).done(Stage("train", "slug", "key")) and seal_file.stat().st_mtime > 1e9


# ------------------------------------------------------------- a file system that does not answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes by sleeping only."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr(patience, "time", clock)
    return now


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ESHUTDOWN])
def test_a_server_that_restarts_is_waited_for(
    code: int, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    monkeypatch.setattr(os, "fsync", away(os.fsync, code, 12))
    write_json(file, {"n": 1})
    assert 20 < clock[0] < patience.LONGEST
    monkeypatch.setattr(Path, "read_text", away(Path.read_text, code, 12))
    assert read_json(file) == {"n": 1} and left(tmp_path) == ["x.json"]


def test_a_server_that_stays_away_is_given_up(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", away(os.fsync, errno.EIO))
    with pytest.raises(OSError, match=r"x\.json"):
        write_json(tmp_path / "x.json", {})
    assert 50 < clock[0] <= patience.LONGEST and left(tmp_path) == []


def test_a_stage_that_cannot_be_read_is_not_damaged(
    root: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, stage = Maker(), Stage("train", "slug", "key")
    folder = once(root, make)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", away(Path.open, errno.ESTALE, 3))
        assert Store(root).done(stage)
    for code in (errno.EIO, errno.EACCES):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"done\.json"):
            patch.setattr(Path, "open", away(Path.open, code))
            once(root, make)
    assert once(root, make) == folder and make.calls == 1


# ------------------------------------------------------------------------------------ single files


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    write_json(file, {"n": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        write_atomic(file, "half")
    assert read_json(file) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"n": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", ["grüße\n", b"\x00\xff"])
def test_bytes_and_text_are_written_as_they_are(data: str | bytes, tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == (data.encode() if isinstance(data, str) else data)


def test_the_cache_is_where_the_user_sets_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BACKFIRE_CACHE", "~/there")
    assert cache_root() == Path("~/there").expanduser()
    monkeypatch.delenv("BACKFIRE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "backfire"


def test_an_empty_file_of_rows_has_none(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    assert read_jsonl(tmp_path / "rows.jsonl") == []


def test_what_vanishes_while_it_is_looked_at_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_text("four")
    gone = [str(tmp_path / "gone"), ["folder"], ["file"]]
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda at: [*walk(at), gone])
    assert sum(stat.st_size for stat in stats_of(tmp_path / "kept")) == 4
    both = tmp_path.stat(), (tmp_path / "kept").stat()
    assert last_change(tmp_path) == max(stat.st_mtime for stat in both)
