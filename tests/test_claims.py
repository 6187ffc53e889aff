"""Claims on jobs: one holder each, whatever the hosts' clocks say, and whoever dies."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from backfire import claims as module
from backfire.claims import STALE, Claim, Claims, Holder, Lost
from tests.helpers.patience import until
from tests.helpers.workers import dead_process

JOB = "cell-0123"


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path)


def elsewhere(claims: Claims, age: float = 0.0, **fields: Any) -> Path:
    """A claim of another host, whose last heartbeat is so old."""
    path = claims.folder / JOB
    path.parent.mkdir(exist_ok=True)
    told = Holder(JOB, "cell a", "far", 7, "u", 0.0, place="far")
    path.write_text(json.dumps({**vars(told), **fields}))
    then = claims.now() - age
    os.utime(path, (then, then))
    return path


def holder(claims: Claims) -> Holder:
    found = claims.read(JOB)
    assert found is not None
    return found


def test_a_claim_has_one_holder_until_it_is_released(claims: Claims) -> None:
    claim = claims.take(JOB, "cell a")
    assert claim is not None and claims.take(JOB) is None
    assert (holder(claims).title, holder(claims).pid) == ("cell a", os.getpid())
    claim.release()
    assert claims.names() == set() and claims.read(JOB) is None
    again = claims.take(JOB)
    assert again is not None
    again.release()


def test_a_heartbeat_writes_what_is_done(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    claim = claims.take(JOB)
    assert claim is not None
    claim.note("loss 0.5 " + "\N{SNOWMAN}" * 400, 3, 8)
    then = claims.now() - 1000
    os.utime(claims.folder / JOB, (then, then))
    until(lambda: holder(claims).done == 3)
    assert (holder(claims).done, holder(claims).total) == (3, 8)
    assert holder(claims).age < 500 and holder(claims).activity.startswith("loss 0.5")
    claim.release()


@pytest.mark.parametrize("hour", [-3600, 3600])
def test_hosts_whose_clocks_are_an_hour_apart(
    hour: float, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the file system's clock counts: neither the time in the claim nor this host's."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + hour)
    elsewhere(claims, age=STALE - 60, since=now - hour)
    assert claims.take(JOB) is None
    elsewhere(claims, age=STALE + 60, since=now + hour)
    claim = claims.take(JOB)
    assert claim is not None and claim.holder.kills == 1
    claim.release()


def test_who_has_what_is_told_with_its_age(claims: Claims) -> None:
    assert list(claims.holders()) == []
    elsewhere(claims, age=100)
    [one] = claims.holders()
    assert (one.host, one.is_stale) == ("far", False) and 99 < one.age < 160
    elsewhere(claims, age=STALE + 60)
    assert [one.is_stale for one in claims.holders()] == [True]


def test_a_dead_process_of_this_host_holds_nothing(claims: Claims) -> None:
    here = Holder("", "", "", 0, "", 0.0, place=module.place())
    elsewhere(claims, pid=dead_process(), place=here.place, began="1")
    claim = claims.take(JOB)
    assert claim is not None
    claim.release()
    elsewhere(claims, pid=os.getpid(), place=here.place, began="another process")
    claim = claims.take(JOB)
    assert claim is not None, "the number was given to a later process"
    claim.release()
    elsewhere(claims, pid=dead_process(), place="another container of this host", began="1")
    assert claims.take(JOB) is None


def test_deaths_are_counted_in_this_round_only(claims: Claims) -> None:
    elsewhere(claims, age=STALE + 1, kills=1)
    claim = claims.take(JOB, since=claims.now() - STALE - 60)
    assert claim is not None and claim.holder.kills == 2
    claim.release()
    elsewhere(claims, age=STALE + 1, kills=1)
    claim = claims.take(JOB, since=claims.now())
    assert claim is not None and claim.holder.kills == 0
    claim.release()


def test_one_of_many_takes_a_stale_claim_over(claims: Claims, tmp_path: Path) -> None:
    for _ in range(20):
        elsewhere(claims, age=STALE + 60)
        start, won = threading.Barrier(8), list[Claim]()

        def take(start: threading.Barrier = start, won: list[Claim] = won) -> None:
            mine = Claims(tmp_path)
            start.wait()
            if claim := mine.take(JOB):
                won.append(claim)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()
        assert claims.names() == set()


def test_a_claim_that_was_just_taken_over_is_left_alone(
    claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker takes the stale claim over after the look."""
    elsewhere(claims, age=STALE + 60)
    faster: list[Claim | None] = []
    is_stale = Holder.is_stale.fget  # type: ignore[attr-defined]

    def slow(self: Holder) -> bool:
        monkeypatch.setattr(Holder, "is_stale", property(is_stale))
        faster.append(Claims(tmp_path).take(JOB))
        return True

    monkeypatch.setattr(Holder, "is_stale", property(slow))
    assert claims.take(JOB) is None
    assert faster[0] is not None and holder(claims).uuid == faster[0].holder.uuid
    faster[0].release()
    assert claims.names() == set()


def test_a_worker_that_was_taken_over_learns_of_it(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a suspended laptop: it stops, and leaves the new holder's claim alone."""
    monkeypatch.setattr(module, "BEAT", 0.01)
    claim = claims.take(JOB)
    assert claim is not None
    (claims.folder / JOB).unlink()
    new = elsewhere(claims)
    until(lambda: claim.lost)
    with pytest.raises(Lost):
        claim.note("", 0, 1)
    claim.release()
    assert new.exists() and holder(claims).host == "far"


def replaced(claim: Claim, tmp_path: Path) -> None:
    """What is open is dead: nothing can be done through it."""
    (tmp_path / "other").touch()
    other = os.open(tmp_path / "other", os.O_RDONLY)
    os.dup2(other, claim._file)
    os.close(other)


def test_a_worker_whose_open_file_is_dead_learns_that_it_was_taken_over(
    claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, which knows no file that was replaced."""
    monkeypatch.setattr(module, "BEAT", 0.01)
    claim = claims.take(JOB)
    assert claim is not None
    claim.path.unlink()
    elsewhere(claims)
    before = claim.path.read_text()
    replaced(claim, tmp_path)
    until(lambda: claim.lost)
    claim.release()
    assert claim.path.read_text() == before


def test_a_heartbeat_goes_on_after_its_open_file_was_dropped(
    claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    claim = claims.take(JOB)
    assert claim is not None
    replaced(claim, tmp_path)
    os.utime(claim.path, (1.0, 1.0))
    claim.note("later", 2, 8)
    until(lambda: holder(claims).done == 2 and holder(claims).age < 600)
    assert not claim.lost and (tmp_path / "other").read_bytes() == b""
    claim.release()
    assert claims.names() == set()


def test_a_claim_is_released_once_its_file_system_is_back(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, unlink, left = claims.take(JOB), os.unlink, [2]

    def away(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        unlink(*arguments, **options)

    assert claim is not None
    monkeypatch.setattr(os, "unlink", away)
    claim.release()
    assert claims.names() == set()


def test_a_claim_that_cannot_be_read_counts_by_its_age(claims: Claims) -> None:
    hostile = vars(Holder(JOB, "a", "far", 7, "../../up", 0.0))
    for content in ("", "{", "[1]", '{"pid": "x"}', "\0" * 1024, json.dumps(hostile)):
        path = elsewhere(claims)
        path.write_text(content)
        assert claims.take(JOB) is None, content
        then = claims.now() - STALE - 1
        os.utime(path, (then, then))
        claim = claims.take(JOB)
        assert claim is not None, content
        claim.release()


def test_a_worker_lives_though_its_disk_is_full(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claims.take(JOB)
    assert claim is not None
    os.utime(claim.path, (1.0, 1.0))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        claim._beat()
    assert not holder(claims).is_stale
    claim.release()


def test_a_worker_that_dies_while_it_takes_over_is_waited_for(claims: Claims) -> None:
    """Its mark is left; that of a living one goes with the takeover."""
    elsewhere(claims, age=STALE + 60)
    mark = claims.folder / ".over-u"
    mark.touch()
    assert claims.take(JOB) is None, "it may be at it"
    then = claims.now() - STALE - 1
    os.utime(mark, (then, then))
    assert claims.take(JOB) is None and not mark.exists()
    claim = claims.take(JOB)
    assert claim is not None and claim.holder.kills == 1
    assert {file.name for file in claims.folder.iterdir()} == {JOB, ".clock"}
    claim.release()


def test_processes_of_another_container_are_not_of_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Numbers of processes mean nothing there."""
    here = module.place.__wrapped__()
    assert here == module.place.__wrapped__()
    monkeypatch.setattr(Path, "readlink", lambda self: Path("pid:[7]"))
    there = module.place.__wrapped__()
    monkeypatch.setattr(Path, "readlink", lambda self: Path("pid:[8]"))
    assert len({here, there, module.place.__wrapped__()}) == 3


def test_a_worker_that_is_killed_while_it_makes_a_claim_holds_nothing(claims: Claims) -> None:
    """No claim is there without its content, or others would wait until it is stale."""
    claims.folder.mkdir()
    for name in ("pwrite", "link", "unlink", "utime"):
        if (child := os.fork()) == 0:
            try:
                setattr(os, name, lambda *_, **__: os._exit(9))
                claims.take(JOB)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, name
        claim = claims.take(JOB)
        assert claim is not None, name
        claim.release()


def test_a_file_system_without_links_has_claims(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    claim = claims.take(JOB)
    assert claim is not None and holder(claims).pid == os.getpid()
    assert claims.take(JOB) is None
    claim.release()
    assert not list(claims.folder.glob(".new-*"))
