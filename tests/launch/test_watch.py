"""Watching workers of a scheduler that is made up: its workers are threads, or end at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backfire.claims import Claims
from backfire.errors import UserError
from backfire.launch.folder import read_plan
from backfire.launch.job import RunFolder
from backfire.launch.stop import Stop
from backfire.launch.watch import View, follow
from tests.helpers.patience import until
from tests.helpers.workers import alone, planned, sleeps


@dataclass
class Scheduler:
    """Runs `do(number)` in a thread for each worker."""

    do: Callable[[int], object]
    name: str = "the scheduler"
    answers: bool = True
    asked: int = 0
    stop: Stop = field(default_factory=Stop)
    """Is signaled at the tenth question."""
    workers: dict[str, threading.Thread] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    cancelled: bool = False
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def start(self, count: int) -> list[str]:
        self.started.append(count)
        numbers = list(itertools.islice(self._numbers, count))
        for number in numbers:
            thread = threading.Thread(target=self.do, args=(number,), daemon=True)
            self.workers[str(number)] = thread
            thread.start()
        return list(map(str, numbers))

    def alive(self) -> dict[str, str]:
        self.asked += 1
        self.stop.signaled |= self.asked == 10
        if not self.answers:
            raise ConnectionError("no route to host")
        return {name: "running" for name, thread in self.workers.items() if thread.is_alive()}

    def end_of(self, worker: str) -> str:
        return "out_of_memory"

    def log_of(self, worker: str) -> str:
        return f"{worker}.log"

    def cancel(self, say: Callable[[str], None]) -> None:
        self.cancelled = True


def watch(run: Path, scheduler: Scheduler, count: int, stop: Stop | None = None) -> list[str]:
    """Follow a planned run; returns the lines that are said."""
    plan, said, whole = read_plan(run), list[str](), stop is None
    stop = Stop(0.5) if stop is None else stop
    view = View(plan.jobs, RunFolder(run, plan.recipe), Claims(run), lambda *_: None)
    follow(view, scheduler, count, said.append, stop, ask=0.01)
    assert not view.waiting or not whole
    return said


def test_workers_do_all_jobs(tmp_path: Path) -> None:
    planned(tmp_path)
    scheduler = Scheduler(lambda _: alone(tmp_path, sleeps(tmp_path, 0.01), stays=False))
    said = watch(tmp_path, scheduler, 3)
    assert scheduler.started[0] == 3
    assert said[0] == "3 workers started in the scheduler."
    ran = (tmp_path / "ran").read_text().split()[::2]
    assert len(ran) == len(set(ran)) == len(read_plan(tmp_path).jobs)


def test_a_worker_that_ends_is_replaced(tmp_path: Path) -> None:
    planned(tmp_path)

    def do(number: int) -> None:
        if number:  # the first one ends before it does anything
            alone(tmp_path, sleeps(tmp_path), stays=False)

    said = watch(tmp_path, Scheduler(do), 1)
    assert "Worker 0 ended: out_of_memory." in said


def test_workers_that_end_in_vain_are_not_replaced_for_ever(tmp_path: Path) -> None:
    planned(tmp_path)
    (tmp_path / "workers").mkdir()
    for number in range(20):
        (tmp_path / f"workers/{number}.log").write_text("Loading\nbackfire: no GPU here\n")
    scheduler = Scheduler(lambda _: None)
    with pytest.raises(UserError, match=r"before a job did; the last one: out_of_memory.*no GPU"):
        watch(tmp_path, scheduler, 2)
    assert sum(scheduler.started) == 2 + 3 * 2


def test_workers_without_a_log_hint_at_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    planned(tmp_path)
    with pytest.raises(UserError, match="is the run folder on a disk that all machines share"):
        watch(tmp_path, Scheduler(lambda _: None), 1)


def test_a_worker_that_refuses_ends_the_watching_with_its_sentence(tmp_path: Path) -> None:
    planned(tmp_path)

    with pytest.raises(UserError, match=r"^The cache is not shared\.$"):
        watch(tmp_path, Scheduler(lambda number: refuse(tmp_path, number, "n1")), 1)


def refuse(run: Path, number: int, host: str) -> None:
    """As the worker of a host does."""
    (run / "workers").mkdir(exist_ok=True)
    (run / f"workers/refused-{number}.txt").write_text(f"{host}\nThe cache is not shared.")


def test_a_machine_that_refuses_ends_only_its_own_worker(tmp_path: Path) -> None:
    """Its free place is not filled: it would be on the same machine."""
    planned(tmp_path)

    def do(number: int) -> None:
        if number in (0, 3):
            refuse(tmp_path, number, f"n{number}")
        else:
            until(lambda: len([*tmp_path.glob("workers/refused-*")]) == 2)
            alone(tmp_path, sleeps(tmp_path, 0.02), stays=False)

    scheduler = Scheduler(do)
    said = watch(tmp_path, scheduler, 4)
    assert scheduler.started == [4] and not scheduler.cancelled
    assert said.count("A worker does not work, and is not replaced. The cache is not shared.") == 2


@pytest.mark.parametrize("count", [3, 8])
def test_machines_that_all_refuse_end_the_watching(count: int, tmp_path: Path) -> None:
    planned(tmp_path)
    scheduler = Scheduler(lambda number: refuse(tmp_path, number, "n1"))
    with pytest.raises(UserError, match=r"^The cache is not shared\.$"):
        watch(tmp_path, scheduler, count)
    assert sum(scheduler.started) == count


@pytest.mark.parametrize(("hosts", "ends"), [(("n1", "n1"), False), (("n1", "n2"), True)])
def test_workers_that_wait_are_not_awaited_if_several_machines_refuse(
    hosts: tuple[str, str], ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path)
    alive = Scheduler.alive
    monkeypatch.setattr(
        Scheduler, "alive", lambda self: alive(self) or {"2": "pending (Resources)"}
    )
    stop = Stop()
    scheduler = Scheduler(lambda number: refuse(tmp_path, number, hosts[number]), stop=stop)
    scheduler.start(2)
    for thread in scheduler.workers.values():
        thread.join()
    monkeypatch.setattr("backfire.launch.watch.forget_refusals", lambda run: None)
    with pytest.raises(UserError, match=r"^The cache is not") if ends else nullcontext():
        watch(tmp_path, scheduler, 3, stop)


def test_refusals_of_a_former_command_are_forgotten(tmp_path: Path) -> None:
    planned(tmp_path)
    refuse(tmp_path, 0, "n1")
    scheduler = Scheduler(lambda _: alone(tmp_path, sleeps(tmp_path), stays=False))
    assert not any("does not work" in line for line in watch(tmp_path, scheduler, 1))


def test_workers_of_a_former_command_are_not_started_again(tmp_path: Path) -> None:
    planned(tmp_path)
    run = sleeps(tmp_path, 0.02)

    def stages() -> int:
        return len([*tmp_path.glob("stages/*")])

    def waits(*arguments: Any) -> str:
        until(lambda: stages() < 3 or scheduler.asked)
        return run(*arguments)

    scheduler = Scheduler(lambda _: alone(tmp_path, waits, stays=False))
    scheduler.start(2)
    until(lambda: stages() >= 3)
    planned(tmp_path)  # as the same command does; it begins a new round
    said = watch(tmp_path, scheduler, 2)
    assert said[0] == "2 workers of this run are in the scheduler."
    assert scheduler.started[:2] in ([2], [2, 1])  # one may be started for the last job


def test_a_scheduler_that_does_not_answer_is_given_up_if_nobody_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path)
    stop = Stop()
    scheduler = Scheduler(lambda _: None, answers=False, stop=stop)
    said = watch(tmp_path, scheduler, 1, stop)
    assert said == ["the scheduler does not answer (no route to host); it is asked again."]
    monkeypatch.setattr("backfire.launch.watch._SILENCE", 0.05)
    with pytest.raises(
        UserError, match=r"has not answered .*no route to host.*no worker was at work"
    ):
        watch(tmp_path, scheduler, 1)


def test_an_answer_is_awaited_while_somebody_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if none has a job at the moment of a question: it may be between two."""
    monkeypatch.setattr("backfire.launch.watch._SILENCE", 1.5)
    planned(tmp_path)
    scheduler = Scheduler(lambda _: alone(tmp_path, sleeps(tmp_path, 0.12)))
    scheduler.start(1)
    until(lambda: [*tmp_path.glob("claims/[!.]*")])
    scheduler.answers = False
    watch(tmp_path, scheduler, 1)


def test_a_run_folder_that_is_away_for_a_while_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path)
    refresh, times = View.refresh, iter(range(99))

    def away(view: View) -> int:
        if next(times) in (1, 2):
            raise OSError("stale file handle")
        return refresh(view)

    monkeypatch.setattr(View, "refresh", away)
    scheduler = Scheduler(lambda _: alone(tmp_path, sleeps(tmp_path, 0.01)))
    watch(tmp_path, scheduler, 1)
    assert next(times) > 3
    monkeypatch.setattr("backfire.launch.watch._SILENCE", 0.0)
    planned(tmp_path / "other")
    times = iter([1] * 99)
    with pytest.raises(OSError, match="stale file handle"):
        watch(tmp_path / "other", scheduler, 1)
