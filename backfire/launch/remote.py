"""What a job of a cluster runs: `backfire work` in a process of its own.

The machines of a cluster must see the run folder and the cache of the machine that starts them.
Each worker checks that before it works: with another cache it would silently do everything again.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from backfire.errors import UserError
from backfire.locks import locked
from backfire.store import cache_root, unique, write_atomic

FOLDER = "workers"
"""Subfolder of a run: the logs of its workers, and why one refused to work."""
REFUSED = 2
"""Exit code of `backfire work` for bad input: another worker on this machine would end like it."""
_REFUSALS = "refused-*.txt"
"""A file for each worker that refused to work: its host, and why."""
_PROBE = "shared.txt"
_OTHER_OUT = "choose another --out"
_SECONDS = 30.0
"""How long a file that was written elsewhere may stay out of sight: NFS caches attributes."""
_CARRIED = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"),
    *("BACKFIRE_SCRATCH", "BACKFIRE_ENDPOINTS"),
)
"""Variables that name places, which a worker shares with the command that starts it, unless its
machine has its own."""


@dataclass(frozen=True)
class Probe:
    """A file of a folder that the machines share, and its content; where it can be read, the folder
    is the same."""

    path: Path
    content: str
    folder: str
    """What the folder is, and its path."""
    advice: str

    def is_here(self) -> bool:
        """Whether this machine reads the same."""
        return _soon(lambda: self.path.read_text(encoding="utf-8") == self.content)

    def refused_by(self, host: str) -> str:
        """What to say if a machine does not read the same."""
        return f"The {self.folder} is not shared with {host}; {self.advice}."


@contextmanager
def probe_of_run(run: Path) -> Iterator[Probe]:
    """A probe in a run's folder, or in the nearest one above that exists; removed at the end."""
    run = run.absolute()
    place = next(one for one in (run, *run.parents) if one.is_dir())
    word = secrets.token_hex(16)
    path = place / f".backfire-{word}"
    try:
        path.write_text(word, encoding="utf-8")
        yield Probe(path, word, f"run folder {run}", _OTHER_OUT)
    finally:
        path.unlink(missing_ok=True)


def unread(probes: Sequence[Probe]) -> list[int]:
    """Places in the list of those that this machine does not read."""
    return [number for number, one in enumerate(probes) if not one.is_here()]


def probe() -> Probe:
    """The probe of the cache; it is written if there is none.

    Raises:
        UserError: the cache cannot be written.
    """
    path = cache_root().absolute() / _PROBE
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path):  # two commands must not write two
                if not path.exists():
                    write_atomic(path, secrets.token_hex(16))
        advice = "set BACKFIRE_CACHE to a folder that all machines share"
        return Probe(path, path.read_text(encoding="utf-8"), f"cache {path.parent}", advice)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"The cache {path.parent} cannot be written: {reason}.") from None


def is_same_cache(content: str) -> bool:
    """Whether the cache of this machine is that whose probe says this."""
    path = cache_root() / _PROBE
    with suppress(OSError):  # it is never written again
        return path.read_text(encoding="utf-8") == content
    return Probe(path, content, "", "").is_here()


@dataclass
class Worker:
    """On a machine of the cluster, it works on a run until nothing is left to do there, or until it
    is stopped."""

    run: Path
    options: tuple[str, ...]
    """Options of `backfire work`."""
    probe: Probe
    environment: dict[str, str] = field(default_factory=lambda: _carried())
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def work(self, name: str) -> int:
        """Work, with a log of this name; returns the exit code of `backfire work`."""
        log = self.run / FOLDER / name
        if problem := self._not_shared():
            sys.stderr.write(f"backfire: {problem}\n")
            self._refuse(problem)
            return REFUSED
        cache = {"BACKFIRE_CACHE": str(self.probe.path.parent)}
        log.parent.mkdir(exist_ok=True)
        words = ["work", str(self.run), *self.options]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*_dies_with_parent(), sys.executable, "-m", "backfire.cli", *words],
                env={**self.environment, **os.environ, **cache},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:  # cancelled
            self.stop()
            raise
        if (code := self._process.wait()) == REFUSED:
            self._refuse(f"On {os.uname().nodename}: {last_line(log)}")
        return code

    def stop(self) -> None:
        """Let the process save a checkpoint and give its job back."""
        if self._process:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
            self._wait()

    def _refuse(self, sentence: str) -> None:
        """Leave word for the command that watches."""
        file = self.run / FOLDER / _REFUSALS.replace("*", unique())
        with suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, f"{os.uname().nodename}\n{sentence}")

    def _wait(self) -> None:
        """Wait until the process has ended. (`Popen.wait` holds a lock: a signal handler that waits
        too would never return. Ray's cancelling does not interrupt a system call.)"""
        assert self._process
        how = os.WEXITED | os.WNOWAIT | os.WNOHANG
        with suppress(ChildProcessError):
            while os.waitid(os.P_PID, self._process.pid, how) is None:
                time.sleep(0.2)

    def _not_shared(self) -> str:
        """Why this machine cannot work on the run; empty if it can."""
        host = os.uname().nodename
        if not _soon((self.run / "jobs.json").is_file):
            return f"The run folder {self.run} is not shared with {host}; {_OTHER_OUT}."
        return "" if self.probe.is_here() else self.probe.refused_by(host)


def refusals(run: Path) -> dict[str, tuple[str, str]]:
    """The workers that refused to work, by the names of their files: host and sentence."""
    found = {}
    for file in sorted((run / FOLDER).glob(_REFUSALS)):
        host, _, sentence = file.read_text(encoding="utf-8").partition("\n")
        found[file.name] = host, sentence
    return found


def forget_refusals(run: Path) -> None:
    """Remove those of a former command."""
    for file in (run / FOLDER).glob(_REFUSALS):
        file.unlink(missing_ok=True)


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty without one."""
    with suppress(OSError):
        lines = log.read_bytes()[-10_000:].decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("backfire: ") if said else ""
    return ""


def _carried() -> dict[str, str]:
    given = {name: os.environ[name] for name in _CARRIED if os.environ.get(name)}
    return {name: str(Path(value).expanduser().absolute()) for name, value in given.items()}


def _dies_with_parent() -> list[str]:
    """On Linux, the process is told to stop when the scheduler's own process is killed."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def _soon(true: Callable[[], bool]) -> bool:
    """Whether something is true, or becomes so while a shared disk may lag behind."""
    end = time.monotonic() + _SECONDS
    while True:
        with suppress(OSError):
            if true():
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.5)
