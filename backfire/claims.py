"""Claims: which worker has which job, as files in the run folder, so that any number of workers on
any hosts share the work without a coordinator.

A claim appears with its content, by a link that only one worker can make, and its heartbeat touches
it. One without a heartbeat is stale, and one worker takes it over, by a rename. Ages are
differences of mtimes, which are all from the clock of the file system; hosts may differ in theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from backfire.errors import Pause
from backfire.patience import patiently

FOLDER = "claims"
BEAT = 30.0
"""Seconds between two heartbeats."""
STALE = 300.0
"""Seconds without a heartbeat after which a claim may be taken over."""
MOST_KILLS = 3
"""Number of workers that die with a job before it counts as failed."""
_IDLE = 20.0  # seconds for which a worker counts as one that waits; it says so every 5
_ROOM = 1024  # bytes of a claim; a heartbeat writes all of them, so none is left of the last


@dataclass(frozen=True)
class Holder:
    """Content of a claim."""

    job: str
    title: str
    host: str
    pid: int
    uuid: str
    since: float
    """When it was made, in seconds since 1970 by its host's clock; for display only."""
    place: str = ""
    """Identifies the host and the numbering of its processes (a container has its own)."""
    began: str = ""
    """When its process began, so that a later one of the same number is told apart."""
    activity: str = ""
    done: int = 0
    total: int = 1
    kills: int = 0
    """Number of workers that died with this job before, in this round."""
    age: float = 0.0
    """Seconds since its last heartbeat."""

    @property
    def is_stale(self) -> bool:
        """Whether its worker is gone: no heartbeat, or a process of this host that has ended."""
        if self.age > STALE:
            return True
        return is_here(self) and self.pid > 0 and _began(self.pid) not in (self.began, "")


class Lost(Pause):
    """The claim was taken over: this worker was silent for too long, and another has its job."""


class Claim:
    """A claim that this process holds, with its heartbeat."""

    def __init__(self, path: Path, descriptor: int, holder: Holder) -> None:
        self.path, self.holder, self.lost = path, holder, False
        self._file, self._over = descriptor, threading.Event()
        self._names = {holder.uuid, _nameless(os.fstat(descriptor))}
        with contextlib.suppress(OSError):  # a full disk: an empty claim counts as well
            self._beat()
        self._thread = threading.Thread(target=self._beats, daemon=True)
        self._thread.start()

    def note(self, activity: str, done: int, total: int) -> None:
        """What `backfire status` shows, from the next heartbeat on.

        Raises:
            Lost: another worker has the job.
        """
        self.holder = replace(self.holder, activity=activity[:100], done=done, total=total)
        if self.lost:
            raise Lost

    def release(self, *, dies: bool = False) -> None:
        """Remove the claim, unless it is another worker's by now. With `dies` it stays: the next
        worker takes it over as that of one that died with the job."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if not dies:
                patiently(self._remove)
        with contextlib.suppress(OSError):  # a file that its server has forgotten
            os.close(self._file)

    def _remove(self) -> None:
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _beats(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
            except OSError:  # the file system may be away for a while, and be back by now
                with contextlib.suppress(OSError):
                    self._open_again()
            with contextlib.suppress(OSError):
                self.lost = not self._is_mine()

    def _beat(self) -> None:
        """Written through the open file: it can never be another worker's."""
        try:
            _write(self._file, self.holder)
        finally:  # on a full disk too, this worker lives
            os.utime(self._file)  # the file system's clock

    def _open_again(self) -> None:
        """After it was away, a file system may have dropped what was open."""
        file = os.open(self.path, os.O_RDWR)
        try:
            if self._is_mine():  # then the opened one is too: no path is had twice
                os.dup2(file, self._file, inheritable=False)
                self._beat()
        finally:
            os.close(file)

    def _is_mine(self) -> bool:
        """By what its path has now: a file server forgets an open file that was replaced."""
        present = _read(self.path, 0.0)
        return present is not None and present.uuid in self._names


class Claims:
    """The claims of a run, in a folder of it."""

    def __init__(self, run: Path, folder: str = FOLDER) -> None:
        self.folder = run / folder
        self._clock = self.folder / ".clock"
        self._idle = self.folder / f".idle-{place()}-{os.getpid()}"

    def now(self) -> float:
        """The time of the file system, as it writes it into mtimes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clock.touch()
        return self._clock.stat().st_mtime

    def names(self) -> set[str]:
        """Ids of the jobs with a claim, stale or not."""
        with contextlib.suppress(FileNotFoundError):
            found = [entry.name for entry in os.scandir(self.folder)]
            return {name for name in found if not name.startswith(".")}
        return set()

    def holders(self) -> Iterator[Holder]:
        """Who has which job, for display; the folder need not be writable."""
        names = sorted(self.names())
        try:
            now = self.now() if names else 0.0
        except OSError:
            now = time.time()
        for name in names:
            if found := self.read(name, now):
                yield found

    def read(self, job: str, now: float | None = None) -> Holder | None:
        """The holder of a job; None without a claim. One that cannot be read counts by its age."""
        now = self.now() if now is None else now
        return _read(self.folder / job, now)

    def wait(self) -> None:
        """Let `free_workers` know that this process waits for a job; to be said again and again."""
        with contextlib.suppress(OSError):
            self._idle.touch()

    def leave(self) -> None:
        """It does not wait any more."""
        with contextlib.suppress(OSError):
            self._idle.unlink(missing_ok=True)

    def free_workers(self, here: int) -> int:
        """Number of workers that can take jobs of training now or soon: this one, those that wait,
        those that have other jobs, and any more of so many `here` that have not begun."""
        now, own, waiting = self.now(), (place(), os.getpid()), 0
        for mark in self.folder.glob(".idle-*"):
            with contextlib.suppress(FileNotFoundError):
                waiting += mark != self._idle and now - mark.stat().st_mtime < _IDLE
        trains: dict[tuple[str, int], bool] = {}
        for one in self.holders():
            worker = one.place, one.pid
            if not one.is_stale and worker != own:
                trains[worker] = trains.get(worker, False) or one.job.startswith("train-")
        busy = [where for (where, _), does in trains.items() if does]
        others = waiting + len(trains) - len(busy)
        return max(1 + others, here - busy.count(place()))

    def take(self, job: str, title: str = "", since: float = 0.0) -> Claim | None:
        """Claim a job; None if another worker has it. A stale claim is taken over; its worker is
        counted as killed if its last heartbeat was after `since` (time of the file system)."""
        path = self.folder / job
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            return self._make(path, _holder(job, title))
        now = self.now()
        former = _read(path, now)
        return self._take_over(former, title, since, now) if former and former.is_stale else None

    def _make(self, path: Path, holder: Holder) -> Claim:
        """A new claim, which is never there without its content: a worker that is killed while it
        writes it has none."""
        own = self.folder / f".new-{holder.uuid}"
        file = os.open(own, _NEW, 0o666)
        try:
            with contextlib.suppress(OSError):  # a full disk: an empty claim counts as well
                _write(file, holder)
            os.link(own, path)
        except FileExistsError:
            os.close(file)
            raise
        except OSError:  # a file system without links
            os.close(file)
            file = os.open(path, _NEW, 0o666)
        finally:
            own.unlink(missing_ok=True)
        return Claim(path, file, holder)

    def _take_over(self, former: Holder, title: str, since: float, now: float) -> Claim | None:
        """Replace a stale claim. Whoever creates a file with its uuid may do so; those who saw the
        same stale claim fail at this, or find that it is gone."""
        path, mark = self.folder / former.job, self.folder / f".over-{former.uuid}"
        try:
            os.close(os.open(mark, _NEW, 0o666))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if now - mark.stat().st_mtime > STALE:  # whoever made it has died
                    mark.unlink()
            return None
        try:
            present = _read(path, now)
            if present is None or present.uuid != former.uuid:
                return None
            kills = former.kills + 1 if now - former.age >= since else 0
            holder = _holder(former.job, title, kills)
            own = self.folder / f".new-{holder.uuid}"
            file = os.open(own, _NEW, 0o666)
            with contextlib.suppress(OSError):
                _write(file, holder)
            own.rename(path)
            return Claim(path, file, holder)
        finally:
            mark.unlink(missing_ok=True)


_NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR


def _write(file: int, holder: Holder) -> None:
    content = {k: v for k, v in vars(holder).items() if k != "age"}
    text = json.dumps(content, ensure_ascii=False).encode()
    os.pwrite(file, text[:_ROOM].ljust(_ROOM), 0)


def _nameless(stat: os.stat_result) -> str:
    """What names the holder of a claim that cannot be read, as on a full disk."""
    return str(stat.st_ino)


def _holder(job: str, title: str, kills: int = 0) -> Holder:
    pid = os.getpid()
    return Holder(
        job=job,
        title=title[:100],
        host=socket.gethostname(),
        pid=pid,
        uuid=uuid.uuid4().hex,
        since=time.time(),
        place=place(),
        began=_began(pid) or "",
        kills=kills,
    )


def is_here(holder: Holder) -> bool:
    """Whether it is a process of this host."""
    return holder.place == place()


def _read(path: Path, now: float) -> Holder | None:
    try:
        with path.open("rb") as file:  # one file, even if the claim is taken over meanwhile
            stat, content = os.fstat(file.fileno()), file.read(_ROOM)
    except FileNotFoundError:
        return None
    unknown = Holder(path.name, path.name, "an unknown host", 0, _nameless(stat), 0.0)
    fields = vars(unknown)
    try:
        told = json.loads(content)
        alike = (type(told[name]) is type(value) for name, value in fields.items() if name != "age")
        if all(alike) and told["uuid"].isalnum():  # a file name is made of it
            fields = {name: told.get(name) for name in fields}
    except (ValueError, KeyError, TypeError):
        pass
    return Holder(**{**fields, "job": path.name, "age": max(0.0, now - stat.st_mtime)})


@lru_cache
def place() -> str:
    """Identifies this host, since it was started, and the numbering of its processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _began(pid: int) -> str | None:
    """When a process of this host began; None if it has ended, empty if the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
