"""Several GPUs, some of which do not answer: the others do all the work. No GPU is needed here."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backfire import claims
from backfire.claims import Claims
from backfire.errors import GpuError
from backfire.experiment import Machine
from backfire.launch import local
from backfire.launch.folder import read_plan
from backfire.launch.job import RunFolder
from backfire.plan import Job
from backfire.store import Store
from tests.helpers.workers import ended, planned

Team = Callable[..., dict[str, str]]


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """Runs a plan with a worker for each of three GPUs, of which some are lost."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(local.multiprocessing, "get_context", lambda how: context)
    monkeypatch.setattr(local, "gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr(logging.getLogger("backfire.datasets"), "level", logging.INFO)

    def run(lost: set[str], does: Any = lambda job, folder, *_: ended(job, folder)) -> Any:
        def check(device: str, gpu: str) -> None:
            with (tmp_path / "begun").open("a") as file:
                file.write(f"{gpu}\n")
            if gpu in lost:
                raise GpuError(f"GPU {gpu} does not answer.")

        monkeypatch.setattr(local, "_check_device", check)
        monkeypatch.setattr(local, "run_job", does)
        plan, machine = read_plan(tmp_path), Machine(device="cuda", workers=3)
        folder, store = RunFolder(tmp_path, "r"), Store(tmp_path / "cache")
        return local.run(plan.jobs, folder, store, machine, lambda *_: None)

    return run


def begun(path: Path) -> list[str]:
    """The GPUs of all workers that began."""
    file = path / "begun"
    return sorted(file.read_text().split()) if file.is_file() else []


def test_a_lost_gpu_is_left_out(
    team: Team, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, whose worker is to stay until all is done: another stays in its place."""
    *_, last = found = planned(tmp_path)
    monkeypatch.setattr(claims, "BEAT", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "place", lambda: "another host")
        claim = Claims(tmp_path).take(last.id)
    assert claim is not None

    def release() -> None:
        if len(begun(tmp_path)) > 4:  # of those on the other two, one has left
            claim.release()
        else:
            threading.Timer(0.05, release).start()

    threading.Timer(0.1, release).start()
    assert team({"0"}) == {job.id: "ok" for job in found}
    assert begun(tmp_path)[:3] == ["0", "0", "1"] and "2" in begun(tmp_path)
    assert "GPU 0 does not answer; it is left out." in caplog.text
    assert "GPU 1" not in caplog.text


def test_without_any_gpu_the_run_ends(team: Team, tmp_path: Path) -> None:
    planned(tmp_path)
    with pytest.raises(GpuError, match=r"^No GPU of \S+ answers any more\. Finished work is kept"):
        team({"0", "1", "2"})
    assert begun(tmp_path) == ["0", "0", "1", "1", "2", "2"]
    assert Claims(tmp_path).names() == set() and not (tmp_path / "stages").exists()


def test_a_job_that_breaks_its_process_costs_no_gpu(
    team: Team, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = planned(tmp_path)

    def does(job: Job, folder: RunFolder, *_: Any) -> str:
        if job.id == found[-1].id and not (tmp_path / "broken").exists():
            (tmp_path / "broken").touch()
            raise GpuError("An illegal memory access.")
        return ended(job, folder)

    assert team(set(), does) == {job.id: "ok" for job in found}
    assert len(begun(tmp_path)) in (3, 4) and "left out" not in caplog.text
