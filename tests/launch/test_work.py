"""Workers that share a run folder: each job once, whatever dies; what cannot be done is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from backfire import claims
from backfire.claims import Claims
from backfire.errors import Away, CellError, GpuError
from backfire.experiment import Machine
from backfire.launch.board import Board
from backfire.launch.folder import read_plan
from backfire.launch.job import RunFolder, report
from backfire.launch.order import by_urgency
from backfire.launch.stop import Stop
from backfire.launch.work import work
from backfire.plan import Job
from backfire.store import Stage, Store, read_json
from tests.helpers.patience import LONG, until
from tests.helpers.workers import (
    SEEDS,
    alone,
    ended,
    names,
    planned,
    ran,
    sleeps,
    start,
    together,
)

PAIR = "data: sandbox-reviews\nmatrix: {seed: [0, 1]}"


def held(path: Path) -> set[str]:
    return Claims(path).names()


def test_a_worker_does_every_job_once(tmp_path: Path) -> None:
    found = planned(tmp_path)
    everything = {job.id: "ok" for job in found}
    assert alone(tmp_path, sleeps(tmp_path)) == everything
    assert ran(tmp_path) == names(found) and len(found) == 17
    assert alone(tmp_path, sleeps(tmp_path)) == everything
    assert ran(tmp_path) == names(found), "a second worker finds all of it done"
    assert held(tmp_path) == set()


@pytest.mark.parametrize("count", [2, 4])
def test_workers_share_a_run(count: int, tmp_path: Path) -> None:
    found, note = planned(tmp_path), sleeps(tmp_path)

    def run(job: Job, *rest: Any) -> str:
        if job.kind == "train":
            (tmp_path / f"{job.id}.begun").touch()
            until(lambda: len([*tmp_path.glob("*.begun")]) >= count)
        return note(job, *rest)

    together(tmp_path, count, run)  # if one waited for another, no job would end
    assert ran(tmp_path) == names(found)


def test_two_launchers_share_a_run(tmp_path: Path) -> None:
    """The same command again, while the first one is at work."""
    found = planned(tmp_path)
    first = start(tmp_path, sleeps(tmp_path, 0.05))
    until(lambda: (tmp_path / "ran").exists())
    planned(tmp_path)
    assert alone(tmp_path, sleeps(tmp_path, 0.05)) == {job.id: "ok" for job in found}
    first.join(LONG)
    cells = [name for name in ran(tmp_path) if name.startswith("cell")]
    assert first.exitcode == 0 and cells == [name for name in names(found) if name in cells]
    assert len(cells) == 8


def test_a_worker_that_lost_its_claim_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a suspended laptop. Here nobody has taken the job, so it does it again."""
    monkeypatch.setattr(claims, "BEAT", 0.01)
    found, lost = planned(tmp_path, PAIR), list[str]()

    def run(job: Job, folder: RunFolder, store: Any, machine: Any, progress: Any, _: Any) -> str:
        if not lost:
            lost.append(job.id)
            (tmp_path / "claims" / job.id).unlink()
            until(lambda: progress(0, 1, "") is not None)
        return ended(job, folder)

    assert alone(tmp_path, run) == {job.id: "ok" for job in found} and len(lost) == 1


def test_a_killed_worker_is_followed_by_another(tmp_path: Path) -> None:
    found = planned(tmp_path, PAIR)
    process = start(tmp_path, sleeps(tmp_path, 60))
    until(lambda: (tmp_path / "ran").exists())
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(held(tmp_path)) == 1, "the claim of the dead"
    assert alone(tmp_path, sleeps(tmp_path)) == {job.id: "ok" for job in found}
    assert ran(tmp_path) == sorted([*names(found), found[0].id])
    assert held(tmp_path) == set()


def test_a_job_that_kills_three_workers_has_failed(tmp_path: Path) -> None:
    found = planned(tmp_path, PAIR)
    victim = found[-1]

    def run(job: Job, folder: RunFolder, *_: Any) -> str:
        if job.id == victim.id:
            os.kill(os.getpid(), signal.SIGKILL)
        return ended(job, folder)

    for _ in range(3):
        process = start(tmp_path, run)
        process.join(LONG)
        assert process.exitcode == -signal.SIGKILL
    everything = alone(tmp_path, run)
    assert everything == {job.id: "ok" for job in found} | {victim.id: "killed"}
    error = RunFolder(tmp_path, "r").cell(victim.experiment, victim.key) / "error.json"
    assert read_json(error)["error"] == "3 workers died with it."
    planned(tmp_path, PAIR)  # the same command again
    assert alone(tmp_path, sleeps(tmp_path))[victim.id] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_gives_the_job_back(number: int, tmp_path: Path) -> None:
    found = planned(tmp_path, PAIR)
    process = start(tmp_path, sleeps(tmp_path, 60))
    until(lambda: (tmp_path / "ran").exists())
    assert process.pid
    os.kill(process.pid, number)
    process.join(LONG)
    assert process.exitcode == 0 and held(tmp_path) == set()
    assert alone(tmp_path, sleeps(tmp_path)) == {job.id: "ok" for job in found}


def test_time_that_is_over_gives_the_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path, PAIR)
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr("backfire.launch.stop.time", clock)
    monkeypatch.setattr("backfire.launch.order.time", clock)
    stop, run = Stop(minutes=50), sleeps(tmp_path, 60)

    def long(*arguments: Any) -> str:
        now[0] = 50 * 60.0
        return run(*arguments)

    assert alone(tmp_path, long, stop=stop) == {}
    assert len(ran(tmp_path)) == 1 and held(tmp_path) == set()


def test_what_failed_is_tried_again_in_the_next_round_only(tmp_path: Path) -> None:
    base, train, *_ = found = planned(tmp_path, PAIR)

    def run(job: Job, folder: RunFolder, *rest: Any) -> str:
        if job.id == train.id:
            return report(job, folder, "nan", "The loss is not finite.")
        return sleeps(tmp_path)(job, folder, *rest)

    cell = next(job for job in found if train.id in job.after and job.kind == "cell")
    everything = {job.id: "ok" for job in found} | {train.id: "nan", cell.id: "nan"}
    assert alone(tmp_path, run) == everything
    assert base.id in ran(tmp_path) and cell.id not in ran(tmp_path)
    error = RunFolder(tmp_path, "r").cell(cell.experiment, cell.key) / "error.json"
    assert read_json(error)["error"] == "The loss is not finite."
    assert alone(tmp_path, sleeps(tmp_path)) == everything
    planned(tmp_path, PAIR)
    assert alone(tmp_path, sleeps(tmp_path)) == {job.id: "ok" for job in found}


def test_a_stage_that_is_locked_blocks_no_other_work(tmp_path: Path) -> None:
    """Another run with the same cache builds it."""
    found = planned(tmp_path)
    needs = next(job for job in found if job.kind == "train")
    store, stage, said = Store(tmp_path / "cache"), Stage("poison", "rows", "0123"), list[str]()
    path = store.path(stage)
    path.parent.mkdir(parents=True)
    lock = FileLock(f"{path}.lock")

    def run(job: Job, folder: RunFolder, store: Store, *_: Any) -> str:
        if job.id == needs.id:
            store.once(stage, lambda folder: None)
        return ended(job, folder)

    def watch(job: Job, text: str, done: int, total: int) -> None:
        said.append(f"{job.id} {text}")
        if "waiting" in text:
            lock.release()

    with lock:
        Path(lock.lock_file).write_text("far")
        everything = alone(tmp_path, run, store=store, watch=watch)
    assert everything == {job.id: "ok" for job in found}
    ends = [line.removesuffix(" ok") for line in said if line.endswith(" ok")]
    last = {job.id for job in found if job is needs or needs.id in job.after}
    assert set(ends[-2:]) == last, "all others came first"
    assert f"{needs.id} waiting for poison rows-0123 on far" in said
    assert store.waits, "a notebook's store waits as ever"


def test_an_idle_worker_waits_for_a_file_system_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not answer to a third of the looks at the clock."""
    *rest, last = planned(tmp_path, PAIR)
    away, now, rng = list[bool](), Claims.now, Random(0)
    monkeypatch.setattr(claims, "BEAT", 0.02)
    monkeypatch.setattr("backfire.patience._FIRST", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "place", lambda: "another host")
        claim = Claims(tmp_path).take(last.id)
    assert claim is not None

    def sometimes(self: Claims) -> float:
        away.append(rng.random() < 1 / 3)
        if away[-1]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return now(self)

    monkeypatch.setattr(Claims, "now", sometimes)
    assert alone(tmp_path, sleeps(tmp_path), stays=False) == {job.id: "ok" for job in rest}
    assert sum(away) > 1
    away.clear()
    other = threading.Thread(target=lambda: (until(lambda: sum(away) > 1), claim.release()))
    other.start()
    assert alone(tmp_path, sleeps(tmp_path))[last.id] == "ok"
    other.join()


@pytest.mark.parametrize("times", [2, 9])
def test_a_server_that_does_not_answer_puts_its_job_back(times: int, tmp_path: Path) -> None:
    """A few times; the others are done before."""
    *others, last = planned(tmp_path, PAIR)
    begun = list[str]()

    def run(job: Job, folder: RunFolder, *_: Any) -> str:
        begun.append(job.id)
        if job.id == last.id and begun.count(job.id) <= times:
            raise Away("http://judge failed 6 times.", "failed")
        return ended(job, folder)

    kind = "ok" if times == 2 else "failed"
    assert alone(tmp_path, run) == {job.id: "ok" for job in others} | {last.id: kind}
    assert begun[-2:] == [last.id] * 2 and begun.count(last.id) == 3
    if times == 9:
        error = RunFolder(tmp_path, "r").cell(last.experiment, last.key) / "error.json"
        assert read_json(error)["error"] == "http://judge failed 6 times."


# ----------------------------------------------------------------------------- which job comes next


def board(path: Path, found: list[Job]) -> Board:
    return Board(found, RunFolder(path, "r"), Claims(path), lambda *_: None)


def take(on: Board, base: object = None) -> Job | None:
    """The next job, for a worker that holds this job's base."""
    number = on.bases[base.id] if isinstance(base, Job) else -1
    taken = on.take(number, lambda _: True)
    if taken:
        taken[1].release()
    return taken[0] if taken else None


def test_a_job_goes_to_the_worker_that_holds_its_base(tmp_path: Path) -> None:
    text = "data: sandbox-reviews\nmatrix: {method: [lora, qlora, {name: lora, rank: 2}]}"
    base, *rest = found = planned(tmp_path, text)
    lora, qlora, again = (job for job in rest if job.kind == "train")
    assert lora.base == again.base != qlora.base
    on = board(tmp_path, found)
    assert take(on, qlora) is base, "the others need it"
    on.end(base, "ok")
    assert (take(on, qlora), take(on, lora), take(on)) == (qlora, lora, lora)
    on.end(lora, "ok")
    assert take(on, lora) is again
    other = Claims(tmp_path).take(again.id)
    assert other is not None
    assert take(on, qlora) is qlora
    on.end(qlora, "ok")
    assert take(on, again) in rest and take(on, again) is not again
    other.release()


def test_a_job_that_all_others_wait_for_has_the_cores_to_itself(tmp_path: Path) -> None:
    """By the plan, not by what has ended: a job that is resumed adds up its sums as before."""
    text = "data: sandbox-policy\nalign: {}\nsafety: {}\nmatrix: {seed: [0, 1]}"
    base, aligned, *rest = found = planned(tmp_path, text)
    on = board(tmp_path, found)
    assert [job.kind for job in rest] == ["train", "train", "cell", "cell"]
    assert on.beside(base, 9) == on.beside(aligned, 9) == on.beside(rest[0], 1) == 1
    assert {on.beside(job, 2) for job in rest} == {2}
    assert {on.beside(job, 9) for job in rest} == {3}, "the other seed's two jobs"
    on.end(base, "ok")
    assert on.beside(aligned, 9) == 1


def test_the_longest_chain_of_jobs_begins_first(tmp_path: Path) -> None:
    align = "[null, {train: {epochs: 9}}]"
    text = f"data: sandbox-policy\nsafety: {{}}\nmatrix: {{align: {align}, seed: [0, 1]}}"
    base, *rest = found = planned(tmp_path, text)
    needed = {name for job in rest if job.kind == "train" for name in job.after}
    aligned = next(job for job in rest if job.id in needed)
    assert found.index(aligned) == 3
    first = by_urgency(found)
    assert first[:2] == [base, aligned] and {job.kind for job in first[2:6]} == {"train"}
    known = [replace(job, minutes=9.0 if job is rest[0] else 1.0) for job in found]
    assert by_urgency(known)[1].id == rest[0].id != aligned.id
    done = set[str]()
    for job in by_urgency(known):
        assert set(job.after) <= done, "and each is after those that it needs"
        done.add(job.id)


def test_a_job_that_can_begin_later_comes_before_less_urgent_ones(tmp_path: Path) -> None:
    text = "data: sandbox-policy\nsafety: {}\n"
    text += "matrix: {align: [null, {train: {epochs: 9}}], seed: [0, 1]}"
    base, *rest = found = planned(tmp_path, text)
    needed = {name for job in rest if job.kind == "train" for name in job.after}
    aligned = next(job for job in rest if job.id in needed)
    late = {job.id for job in rest if job.kind == "train" and aligned.id in job.after}
    jobs = [replace(job, minutes=9.0 if job.id in late else 1.0) for job in found]
    on, begun = board(tmp_path, jobs), list[str]()
    while (job := take(on)) is not None:
        begun.append(job.id)
        on.end(job, "ok")
    assert begun[:2] == [base.id, aligned.id] and set(begun[2:4]) == late
    kinds = {job.id: job.kind for job in found}
    assert [kinds[name] for name in begun[4:]] == ["train"] * 2 + ["cell"] * 4
    on = board(tmp_path, jobs)
    on.end(next(job for job in jobs if job.id in late), "ok")  # by another worker
    on.end(base, "ok")
    on.end(aligned, "ok")
    first = take(on)
    assert first is not None and first.id in late and first.id not in on.ended


def test_the_jobs_of_a_local_run_have_estimates(tmp_path: Path) -> None:
    """Without torch, so that a run begins as soon as before."""
    code = """
import sys
from backfire import plan, recipe
from backfire.commands.plan import with_minutes
from backfire.model.types import types_of_cpu
from backfire.store import Store
found = recipe.load("tour")
for job in with_minutes(plan.jobs(found.cells, found.axes), Store(), types_of_cpu()):
    assert job.kind == "base" or 0 < job.minutes < 9, job
assert "torch" not in sys.modules
"""
    env = {**os.environ, "BACKFIRE_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_a_job_that_does_not_fit_is_left(tmp_path: Path) -> None:
    found = planned(tmp_path, PAIR)
    small, large = (job for job in found if job.kind == "cell")
    needs = {large.id: {"memory": 9e9}, small.id: {"minutes": 50.0}}
    jobs = [Job(**{**vars(job), **needs.get(job.id, {})}) for job in found]

    def done(**options: Any) -> set[str]:
        planned(tmp_path, PAIR, f"seed={[0, 1]}")
        folder, store = RunFolder(tmp_path, "r"), Store(tmp_path / "cache")
        watch, run = (lambda *_: None), sleeps(tmp_path)
        return set(work(jobs, folder, store, Machine(), watch, run=run, **options))

    everything = {job.id for job in jobs}
    assert done(memory=8e9, stop=Stop(minutes=49)) == everything - {large.id}, "it goes on later"
    assert done(memory=10e9) == everything


def test_a_worker_leaves_when_others_have_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gives no sign of life may be dead: its claim is waited for, and taken over."""
    *rest, last = planned(tmp_path, PAIR)
    monkeypatch.setattr(claims, "BEAT", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "place", lambda: "another host")
        claim = Claims(tmp_path).take(last.id)
    assert claim is not None
    assert alone(tmp_path, sleeps(tmp_path), stays=False) == {job.id: "ok" for job in rest}
    assert held(tmp_path) == {last.id}
    claim._over.set()  # the other host is gone
    claim._thread.join()
    monkeypatch.setattr(claims, "STALE", 0.5)
    assert alone(tmp_path, sleeps(tmp_path), stays=False)[last.id] == "ok"
    assert ran(tmp_path) == names([*rest, last])


def test_an_error_that_stops_a_job_is_no_pause(tmp_path: Path) -> None:
    """A claim is released whatever happens."""
    planned(tmp_path, PAIR)

    def run(*_: Any) -> str:
        raise CellError("failed", "A bug.")

    with pytest.raises(CellError):
        alone(tmp_path, run)
    assert held(tmp_path) == set()


def test_a_job_that_breaks_the_gpu_is_left_as_by_a_worker_that_died(tmp_path: Path) -> None:
    """Nobody knows whether the job or the GPU is at fault: another process tries it, three times in
    all."""
    base, *rest = planned(tmp_path, PAIR)

    def breaks(*_: Any) -> str:
        raise GpuError("The GPU does not answer any more.")

    for number in range(claims.MOST_KILLS):
        worker = start(tmp_path, breaks)
        worker.join(LONG)
        [left] = Claims(tmp_path).holders()
        assert (worker.exitcode, left.job, left.is_stale, left.kills) == (1, base.id, True, number)
    assert set(alone(tmp_path, sleeps(tmp_path)).values()) == {"killed"}
    assert held(tmp_path) == set() and not (tmp_path / "ran").exists()
    planned(tmp_path, PAIR)
    assert set(alone(tmp_path, sleeps(tmp_path)).values()) == {"ok"}, "the next round tries again"
    assert ran(tmp_path) == names([base, *rest])


def test_parts_of_a_plan_are_in_the_order_of_their_needs(tmp_path: Path) -> None:
    for edits in (["seed=0"], ["seed=1", "method=lora"], ["seed=[0, 1]"]):
        planned(tmp_path, SEEDS, *edits)
    jobs, earlier = read_plan(tmp_path).jobs, set[str]()
    assert len(jobs) == 1 + 2 * 3
    for job in jobs:
        assert set(job.after) <= earlier
        earlier.add(job.id)
