"""Ctrl-C as a terminal sends it, to every process of the command; and the log for machines, of all
of them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from backfire import cli
from backfire.claims import Claims
from backfire.launch.stop import Stop
from backfire.store import read_json
from tests.helpers.command_line import Run
from tests.helpers.patience import LONG

RECIPE = """# Does it stop?
model: {model}
data: {{name: sandbox-reviews, rows: 60, test_rows: 12}}
template: sentiment-line
method: full
train: {{max_steps: {steps}, batch_size: 8}}
matrix: {{seed: [0, 1]}}
metrics: [accuracy]
"""
NOISY = '''
"""A metric whose libraries are noisy, and that fails."""
import os, sys, warnings
from backfire.base import Metric
from backfire.registry import register

print("from", "a plug-in", file=sys.stderr)

@register("noisy")
class Noisy(Metric):
    """Measures nothing."""

    def measure(self, evidence):
        warnings.warn("a library's warning")
        os.write(2, b"past Python: \\xff { no JSON\\n10%\\r90%\\n")
        raise ValueError("odd\\ntwo lines")
'''


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    """SIGINT as in a terminal: whatever a script starts with & ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def command(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command with a process group of its own, as a shell starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "backfire.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def left_of(group: int) -> list[psutil.Process]:
    """The group's processes that have not ended. (One that nobody waits for has ended, too.)"""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_every_worker_saves_a_checkpoint_and_gives_its_job_back(here: Path, tiny: Path) -> None:
    (here / "r.yaml").write_text(RECIPE.format(model=tiny, steps=100_000))
    words = ("run", "r.yaml", "--workers", "2", "--out", "my run", "--log-format", "json")
    with command(*words) as process:
        assert process.stderr is not None
        entries, training = [], set[str]()
        for line in process.stderr:
            entries.append(json.loads(line))
            training |= {entries[-1]["job"]} if entries[-1].get("kind") == "train" else set()
            if len(training) == 2:
                break
        time.sleep(1)
        ctrl_c(process)
        entries += map(json.loads, process.stderr)
        assert process.wait(LONG) == 130
    notes = [entry["text"] for entry in entries if entry["event"] == "note"]
    assert notes == [
        "Stopping, with a checkpoint of what is at work; Ctrl-C again ends it at once.",
        "backfire: Interrupted. Finished work is kept; to continue: "
        "backfire run r.yaml --workers 2 --out 'my run' --log-format json",
    ]
    assert Claims(here / "my run").names() == set()
    checkpoints = here.glob("cache/train/*.partial/checkpoints/*/done.json")
    assert len({file.parents[2] for file in checkpoints}) == 2
    end = time.monotonic() + LONG  # the server of workers ends when it sees that the command has
    while left_of(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert left_of(process.pid) == []


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_and_the_same_command_again(here: Path, tiny: Path) -> None:
    """The key itself, as soon as one of the workers trains; the other may be ahead or behind."""
    (here / "r.yaml").write_text(RECIPE.format(model=tiny, steps=120))
    line = [sys.executable, "-m", "backfire.cli", "run", "r.yaml", "--workers", "2"]
    line += ["--log-format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "TERM": "xterm"}
    ours, theirs = pty.openpty()
    shown = list[bytes]()
    process = subprocess.Popen(
        line,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)

    def read() -> None:
        with suppress(OSError):  # the terminal is closed
            while chunk := os.read(ours, 4096):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    checkpoints = "cache/train/*.partial/checkpoints/*/done.json"
    training = re.compile(rb'"job": "([^"]*)", "kind": "train", [^\n]*loss')
    while not training.search(b"".join(shown)) and process.poll() is None:
        time.sleep(0.05)
    os.write(ours, b"\x03")
    assert process.wait(LONG) == 130
    reader.join(LONG)
    os.close(ours)
    assert b"Interrupted." in b"".join(shown)
    assert Claims(here / "runs" / "r").names() == set()
    assert [*here.glob(checkpoints)]
    again = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=LONG)
    assert again.returncode == 0, again.stderr
    results = [read_json(file) for file in here.glob("runs/r/cells/*/result.json")]
    assert [result["status"] for result in results] == ["ok", "ok"]


@pytest.mark.slow
def test_every_line_of_every_process_is_json(here: Path, tiny: Path) -> None:
    (here / "noisy.py").write_text(NOISY)
    recipe = RECIPE.replace("[accuracy]", "[noisy]").replace("full", "none")
    (here / "r.yaml").write_text(recipe.format(model=tiny, steps=2))
    words = ("run", "r.yaml", "--workers", "2", "--plugin", "noisy.py", "--log-format", "json")
    with command(*words) as process:
        _, printed = process.communicate(timeout=LONG)
        assert process.returncode == 1
    entries = [json.loads(line) for line in printed.splitlines()]
    ends = {(e["kind"], e["exit"]) for e in entries if e["event"] == "end"}
    assert ends == {("base", "ok"), ("cell", "failed")}
    notes = [entry["text"] for entry in entries if entry["event"] == "note"]
    assert notes.count("from a plug-in") == 3, "the command and two workers"
    assert notes.count("past Python: � { no JSON") == notes.count("90%") >= 1
    for text in ("a library's warning", "ValueError: odd"):
        assert any(text in note for note in notes)


def test_the_second_ctrl_c_ends_at_once() -> None:
    stop, told = Stop(), threading.Event()
    with stop.on_signals(told.set):
        signal.raise_signal(signal.SIGINT)
        assert told.wait(LONG) and stop and stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "a third one ends this process"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop().on_signals(told.set):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a script started it with &"
    signal.signal(signal.SIGINT, former)
    stop = Stop()
    with stop.on_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not stop


@pytest.mark.parametrize("command", [("run", "r.yaml"), ("work", "run")])
def test_ctrl_c_at_the_end_loses_no_report(
    command: tuple[str, ...], backfire: Run, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs have ended: there is nothing to continue."""
    from backfire.launch import local

    def run(jobs: Any, *_: Any, stop: Stop, **options: Any) -> dict[str, str]:
        stop.signaled = stop.interrupted = True
        return {job.id: "failed" for job in jobs[: len(jobs) - left]}

    (here / "r.yaml").write_text(RECIPE.format(model=tiny, steps=2))
    assert backfire("plan", "r.yaml", "--out", "run").code == 0
    monkeypatch.setattr(local, "run", run)
    out = ("--out", "run") if command[0] == "run" else ()
    left = 1
    output = backfire(*command, *out)
    assert output.code == 130 and "Interrupted." in output.err
    left = 0
    output = backfire(*command, *out)
    assert output.code == len(out[:1]) and "Interrupted." not in output.err
