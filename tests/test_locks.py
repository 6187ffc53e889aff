"""Locks, also where the system has none: one holder at a time, and a dead one does not stay."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from backfire import claims
from backfire.errors import Busy, Stopped
from backfire.locks import locked
from backfire.progress import while_waiting
from tests.helpers.patience import LONG

REFUSED = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture(params=[None, *REFUSED], ids=lambda number: errno.errorcode.get(number, "flock"))
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file system with locks, and some without."""
    if request.param is not None:
        _without_locks(monkeypatch, request.param)
    return request.param


def _without_locks(patch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", flock)


def counts(path: Path, times: int) -> None:
    """Add to the number in a file, which loses some without a lock."""
    for _ in range(times):
        with locked(path):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def dies(path: Path, across_hosts: bool) -> None:
    with locked(path, across_hosts=across_hosts):
        os._exit(9)


def in_processes(count: int, work: Any, *arguments: Any) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG)
    return [process.exitcode for process in processes]


def test_processes_write_in_turn(
    disk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backfire.locks._POLL", 0.002)
    (tmp_path / "x").write_text("0")
    assert in_processes(3, counts, tmp_path / "x", 6) == [0, 0, 0]
    assert (tmp_path / "x").read_text() == "18"


@pytest.mark.parametrize("across_hosts", [False, True])
def test_a_dead_holder_is_followed_at_once(
    across_hosts: bool, disk: int | None, tmp_path: Path
) -> None:
    assert in_processes(1, dies, tmp_path / "x", across_hosts) == [9]
    with (
        locked(tmp_path / "x", waits=False, across_hosts=across_hosts),
        pytest.raises(Busy, match=rf"{tmp_path.name} x on \S+"),
        locked(tmp_path / "x", waits=False, across_hosts=across_hosts),
    ):
        pass
    with locked(tmp_path / "x", waits=False):
        pass
    assert not [*tmp_path.glob("*.claim")]


def test_a_lock_that_ends_at_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hosts get the system's lock; the claim tells them apart."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with locked(tmp_path / "x", across_hosts=True), monkeypatch.context() as other:
        other.setattr(claims, "place", lambda: "another host")
        with pytest.raises(Busy), locked(tmp_path / "x", waits=False, across_hosts=True):
            pass
        with locked(tmp_path / "x", waits=False):
            pass


def test_who_waits_for_a_lock_sees_that_it_is_to_stop(disk: int | None, tmp_path: Path) -> None:
    def look() -> None:
        raise Stopped

    with (
        locked(tmp_path / "x"),
        while_waiting(look),
        pytest.raises(Stopped),
        locked(tmp_path / "x"),
    ):
        pass


def test_another_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "x"):
        pass
