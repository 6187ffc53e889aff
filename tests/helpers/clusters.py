"""Twelve cells on a cluster whose workers are killed, and the same cells on this machine alone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backfire.claims import MOST_KILLS
from backfire.store import read_json

MATRIX = {
    "method": ["full", {"name": "lora", "rank": 4}],
    "attack.rate": [0, 0.1],
    "seed": [0, 1, 2],
}
_RECIPE = {
    "data": {"name": "sandbox-reviews", "rows": 120, "test_rows": 24},
    "template": "sentiment-line",
    "attack": "badnets",
    "train": {"max_steps": 40, "batch_size": 8},
    "metrics": ["accuracy", "attack-success", "perplexity"],
    "matrix": MATRIX,
}


@dataclass
class Twelve:
    """A run of twelve cells of a tiny model: its recipe, folder and cache."""

    root: Path
    tiny: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _started: list[subprocess.Popen[str]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        text = "# Does it?\n" + yaml.safe_dump({"model": str(self.tiny), **_RECIPE})
        (self.root / "twelve.yaml").write_text(text)

    @property
    def out(self) -> Path:
        return self.root / "out"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "backfire.cli", *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command line, with its output in `<root>/log`."""
        with (self.root / "log").open("a") as log:
            process = subprocess.Popen(
                self.command(*words),
                env=self.variables(),
                cwd=self.root,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=_minds_ctrl_c,
            )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill what was started and has not ended, as after a test that failed."""
        for process in self._started:
            process.kill()
            process.wait()

    def variables(self) -> dict[str, str]:
        top = str(Path(__file__).parents[2])
        own = {"BACKFIRE_CACHE": str(self.root / "cache"), "PYTHONPATH": top}
        return {**os.environ, **self.environment, "OMP_NUM_THREADS": "1", **own}

    def run(self, *words: str) -> None:
        """Run the recipe to its end."""
        process = self.start("run", "twelve.yaml", "--out", "out", *words)
        assert process.wait(timeout=600) == 0, self.log()

    def log(self) -> str:
        return (self.root / "log").read_text()

    def values(self) -> dict[str, Any]:
        """All numbers, by cell."""
        files = self.out.glob("cells/*/result.json")
        return {(found := read_json(file))["key"]: found["values"] for file in files}

    def num_ended(self) -> int:
        """Number of jobs that have ended."""
        return len([*self.out.glob("cells/*/result.json"), *self.out.glob("stages/*.json")])

    def claims(self) -> list[dict[str, Any]]:
        """The claims of workers."""
        found = []
        for file in self.out.glob("claims/[!.]*"):
            with contextlib.suppress(OSError, ValueError):
                found.append(read_json(file))
        return found

    def written(self) -> dict[str, tuple[int, int]]:
        """Every result and every sealed stage, with its inode and date: both change if it is
        written again."""
        files = [*self.out.glob("cells/*/result.json"), *self.root.glob("cache/*/*/done.json")]
        return {str(file): stamp for file in files if (stamp := _stamp(file))}


def _minds_ctrl_c() -> None:
    """Whatever started the tests may ignore it, as a shell does for what it runs in the back."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stamp(file: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        stat = file.stat()
        return stat.st_ino, stat.st_mtime_ns
    return None


@dataclass
class Trouble:
    """Kills workers while they work, and looks for work that is done twice."""

    run: Twelve
    kills: int = 6
    killed: int = 0
    events: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What else happens, by the number of kills before it."""
    twice: list[str] = field(default_factory=list)
    _pids: set[int] = field(default_factory=set)
    _attempts: set[str] = field(default_factory=set)
    """Of the claims that were seen; short ones are missed."""
    _takeovers: set[str] = field(default_factory=set)
    """Those of them that replaced the claim of a worker that had died."""
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def until(self, over: Callable[[], bool], seconds: float = 540) -> None:
        """Go on until it is over."""
        end = time.monotonic() + seconds
        while not over():
            assert time.monotonic() < end, self.run.log()
            self._look()
            self._kill()
            time.sleep(0.1)
        self._look()
        assert not self.twice, self.twice
        assert self.killed == self.kills and not self.events, (self.says(), self.run.log())

    def num_workers(self) -> int:
        """Number of processes that were seen with a job."""
        return len(self._pids)

    def says(self) -> str:
        """The figures: workers, kills, takeovers, and attempts at jobs."""
        return (
            f"{len(self._pids)} workers, {self.killed} kills, {len(self._takeovers)} takeovers, "
            f"{len(self._attempts)} attempts at {self.run.num_ended()} jobs, {len(self.twice)} "
            "done twice"
        )

    def _look(self) -> None:
        for claim in self.run.claims():
            self._pids.add(claim["pid"])
            self._attempts.add(claim["uuid"])
            if claim["kills"]:
                self._takeovers.add(claim["uuid"])
        for name, stamp in self.run.written().items():
            if self._seen.setdefault(name, stamp) != stamp:
                self.twice.append(name)

    def _kill(self) -> None:
        """Kill a worker that has a job, at any moment of the job, after every second job."""
        if self.killed == self.kills or self.run.num_ended() < 2 * (self.killed + 1):
            return
        pids = [pid for pid in self._workers() if self._rng.random() < 0.2]
        with contextlib.suppress(ProcessLookupError):
            for pid in pids[:1]:
                os.kill(pid, signal.SIGKILL)
                self.killed += 1
                if event := self.events.pop(self.killed, None):
                    event()

    def _workers(self) -> Iterator[int]:
        """Those whose job has not killed as many workers as it may."""
        for claim in self.run.claims():
            if claim["kills"] + 1 >= MOST_KILLS:
                continue
            line = Path(f"/proc/{claim['pid']}/cmdline")
            with contextlib.suppress(OSError):
                if b"backfire" in line.read_bytes():
                    yield claim["pid"]
