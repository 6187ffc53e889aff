"""Processes that must outlast a worker do not get the signals that tell it to stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.experiment import Machine
from backfire.launch import local
from backfire.launch.job import RunFolder
from backfire.launch.stop import Stop
from backfire.plugins import Plugin
from backfire.signals import TO_STOP
from backfire.store import Store
from backfire.train import members
from tests.helpers.patience import LONG, until
from tests.helpers.workers import planned


@pytest.fixture
def _as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, *TO_STOP)
    former = [signal.getsignal(one) for one in numbers]
    yield
    for one, handler in zip(numbers, former, strict=True):
        signal.signal(one, handler)


def test_another_rank_ends_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec cat\n")
    program.chmod(0o755)
    monkeypatch.setattr(members.sys, "executable", str(program))
    rank = members.start(1, 2)
    for number in TO_STOP:
        os.kill(rank.pid, number)
    members.send(rank, b"task")
    assert rank.stdin is not None
    rank.stdin.close()
    assert rank.wait(LONG) == 0


@pytest.mark.usefixtures("_as_before")
def test_another_rank_of_a_launcher_ends_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    store.set(members.task_key(1), b"")
    monkeypatch.setattr(members, "launched", lambda: (1, 2))
    monkeypatch.setattr(members, "meet", lambda: (store, 1, 2))
    assert members.serves()
    for number in (signal.SIGINT, *TO_STOP):
        assert signal.getsignal(number) is signal.SIG_IGN


class _Late:
    """Plug-ins of a worker that begins to work only once it was told to stop."""

    def __init__(self, told: Path) -> None:
        self.told = told

    def __iter__(self) -> Iterator[Plugin]:
        until(self.told.exists)
        return iter(())


@pytest.mark.parametrize("number", TO_STOP)
def test_a_worker_stops_at_a_signal_that_came_before_it_worked(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same way as one that works."""

    def work(*_: Any, stop: Stop, **options: Any) -> None:
        (tmp_path / "stopped").write_text(str(stop.signaled))

    monkeypatch.setattr(local, "work", work)
    folder, store = RunFolder(tmp_path, "r"), Store(tmp_path / "cache")
    arguments = planned(tmp_path), folder, store, Machine(device="cpu")
    _, far = multiprocessing.Pipe()
    with local._without_signals():
        worker = _forked(
            local._work, _Late(tmp_path / "told"), far, None, arguments, {"stop": Stop()}
        )
    assert worker.pid
    os.kill(worker.pid, number)
    (tmp_path / "told").touch()
    worker.join(LONG)
    assert worker.exitcode == 0 and (tmp_path / "stopped").read_text() == "True"


def test_the_server_of_workers_outlasts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they look dead, and nobody hears that they save their checkpoints."""
    server = forkserver.ForkServer()
    monkeypatch.setattr(local, "forkserver", server)
    monkeypatch.setattr(local, "_forkserver", lambda: None)
    monkeypatch.setattr(local, "has_gpu", lambda: False)
    local.warm_up()
    pid = server._forkserver_pid  # type: ignore[attr-defined]
    for number in (signal.SIGINT, *TO_STOP):
        os.kill(pid, number)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    server._stop()  # type: ignore[attr-defined]


def _forked(work: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process
