"""The cache of stages: folders that are either complete or absent.

A stage is built in `<cache>/<stage>/<slug>-<key>.partial`, sealed by a `done.json` with the size
and SHA-256 of every file, and renamed into place. If the folder exists, the stage is done. With
`$BACKFIRE_SCRATCH`, a fast disk of this machine, it is built there and copied when it is whole, or
when its worker is told to stop.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from backfire.claims import place as place_of_processes
from backfire.errors import Stopped, is_away
from backfire.locks import locked
from backfire.patience import patiently

SEAL = "done.json"
CHECKPOINTS = "checkpoints"
"""Subfolder of a stage in progress; deleted when the stage is done."""
_HOUR, _DAY = 3600.0, 86400.0
_HASHED_ON_READ = 64 * 2**20  # larger folders are checked by size alone


@dataclass(frozen=True)
class Stage:
    """Names one folder of the cache: the kind of stage, a readable name, and its key."""

    kind: str
    slug: str
    key: str


def digest(value: Any, length: int = 12) -> str:
    """Short hash of a plain value; dict order does not matter."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def slug(text: str) -> str:
    """A safe file name of at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:80] or "x"


def cache_root() -> Path:
    """`$BACKFIRE_CACHE`, else the user's cache folder."""
    if path := os.environ.get("BACKFIRE_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "backfire"


def scratch_root() -> Path | None:
    """`$BACKFIRE_SCRATCH`, where stages are built if it is set."""
    path = os.environ.get("BACKFIRE_SCRATCH")
    return Path(path).expanduser() if path else None


def unique() -> str:
    """A name that no other process has, on any host or in any container: host.pid.random."""
    return f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"


_UNIQUE = re.compile(r"([^.]+)\.(\d+)\.[0-9a-f]{8}")


def _host() -> str:
    """This host and its numbering of processes: containers may share the name of their host."""
    return f"{slug(socket.gethostname().replace('.', '-'))[:40]}-{place_of_processes()[:6]}"


def write_atomic(path: Path, data: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file so that it is the old or the new one, never a part, even across a power cut. A
    file system that does not answer is waited for. `mode` are its permissions, less the umask."""
    if not path.name:  # as in "" or "."
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    patiently(lambda: _write(path, data, mode))


def _write(path: Path, data: str | bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{unique()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, how: os.open(name, how, mode)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # name the target file, not the temporary one
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # so that it does not hide the first error
            temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, **options: Any) -> Any:
    """Read a JSON file; the options are those of `json.loads`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested too deeply.
    """
    text = patiently(lambda: path.read_text(encoding="utf-8"))
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, *, hash_large: bool = True) -> None:
    """Write `done.json` last: sizes and hashes of all files in the folder, except checkpoints.

    Without `hash_large`, files that together are too large to be hashed by `intact` have no hash:
    it would be the slowest part of writing them.
    """
    excluded = folder / CHECKPOINTS
    for file in folder.rglob(".*.tmp"):  # of a process that was killed in `write_atomic`
        file.unlink()
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name != SEAL and excluded not in p.parents
    )
    _sync(folder)
    sizes: dict[str, Any] = {str(p.relative_to(folder)): {"bytes": p.stat().st_size} for p in files}
    if hash_large or _are_hashed(sizes):
        for path in files:
            sizes[str(path.relative_to(folder))]["sha256"] = sha256(path)
    write_json(folder / SEAL, sizes)


def _are_hashed(sizes: dict[str, Any]) -> bool:
    """Whether `intact` hashes these files of a sealed folder; larger ones are checked by size."""
    total: int = sum(entry["bytes"] for entry in sizes.values())
    return total <= _HASHED_ON_READ


def intact(folder: Path) -> bool:
    """Whether a sealed folder is unchanged, by sizes and, unless it is large, by hashes.

    Raises:
        OSError: it cannot be read, which says nothing about it.
    """
    try:
        return patiently(lambda: _matches(folder))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    except OSError as error:
        if is_away(error) or isinstance(error, PermissionError):
            raise
        return False


def _matches(folder: Path) -> bool:
    """Whether the files are as in the seal, which ends with a line break: it is complete."""
    text = (folder / SEAL).read_text(encoding="utf-8")
    if not text.endswith("\n"):
        return False
    sizes = json.loads(text)
    hashed = _are_hashed(sizes)
    return all(
        (folder / name).stat().st_size == entry["bytes"]
        and (not hashed or sha256(folder / name) == entry["sha256"])
        for name, entry in sizes.items()
    )


class Store:
    """The cache of stages. With `waits`, a stage that another process builds is waited for; without
    it, `Busy` is raised."""

    def __init__(self, root: Path | None = None, *, waits: bool = True) -> None:
        self.root, self.waits = root or cache_root(), waits
        scratch = scratch_root()
        # Of this cache and this user: others may use the same scratch folder.
        name = f"backfire-{digest([str(self.root.absolute()), os.getuid()])}"
        self.scratch = scratch / name if scratch else self.root
        """Where stages are built."""
        self._verified: set[Path] = set()

    def path(self, stage: Stage) -> Path:
        return self.root / stage.kind / f"{stage.slug}-{stage.key}"

    def done(self, stage: Stage) -> bool:
        """Whether the stage is complete."""
        path = self.path(stage)
        if path not in self._verified and intact(path):
            self._verified.add(path)
            _mark_used(path)
        return path in self._verified

    def once(self, stage: Stage, make: Callable[[Path], None], *, resumable: bool = False) -> Path:
        """The folder of this stage, built by `make(folder)` if it does not exist.

        A second process waits for the first, or raises `Busy`. With `resumable`, an attempt
        continues in the folder of an interrupted one; otherwise each attempt starts empty. A
        damaged folder is renamed to `.damaged` and built again.
        """
        path = self.path(stage)
        if self.done(stage):
            return path
        patiently(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        # Attempts that start empty have folders of their own, so two of them only waste time.
        with locked(path, waits=self.waits, across_hosts=resumable):
            if self.done(stage):
                return path
            if path.exists():  # only the holder of the lock may move it
                damaged = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                path.replace(damaged)
            self._build(path, make, resumable=resumable)
        self._verified.add(path)
        return path

    def temporary(self, stage: Stage) -> AbstractContextManager[Path]:
        """A folder for the content of a stage that is not worth keeping; removed at the end."""
        return _attempt(self._place(self.path(stage)))

    def _place(self, path: Path) -> Path:
        """Where a stage is built."""
        return self.scratch / path.parent.name / f"{path.name}.partial"

    def _build(self, path: Path, make: Callable[[Path], None], *, resumable: bool) -> None:
        place, shared = self._place(path), path.with_name(f"{path.name}.partial")
        moves = resumable and place != shared
        with nullcontext(place) if resumable else _attempt(place) as partial:
            if moves:
                _transfer(shared, partial)
            partial.mkdir(parents=True, exist_ok=True)
            try:
                make(partial)
            except Stopped:  # a worker of another machine may go on; at worst, it begins anew
                with contextlib.suppress(OSError):
                    if moves:
                        _transfer(partial, shared)
                raise
            seal(partial)
            if self.scratch == self.root:
                _rename(partial, path)
            else:
                with _attempt(shared) as copied:
                    _copy(partial, copied)
                    _rename(copied, path)
                shutil.rmtree(partial, ignore_errors=True)
                if moves:
                    shutil.rmtree(shared, ignore_errors=True)
        # Only now: an attempt killed before this point resumes from them.
        shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)


@contextlib.contextmanager
def _attempt(place: Path) -> Iterator[Path]:
    """A folder in `place` that no other attempt uses; removed at the end unless it was renamed."""
    _remove_dead(place)
    folder = place / unique()
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it may hold the attempt of another host
            place.rmdir()


def _remove_dead(place: Path) -> None:
    """Remove what killed attempts have left: those whose process on this host is gone, and those of
    other hosts, containers or boots that are unchanged for a day."""
    for folder in place.glob("*.*.*"):
        if not (name := _UNIQUE.fullmatch(folder.name)):
            continue
        dead = name[1] == _host() and not psutil.pid_exists(int(name[2]))
        if dead or time.time() - last_change(folder) > _DAY:
            shutil.rmtree(folder, ignore_errors=True)


def last_change(folder: Path) -> float:
    """When a file in the folder, or the folder, last changed: the latest mtime."""
    return max((stat.st_mtime for stat in stats_of(folder)), default=0.0)


def stats_of(place: Path) -> Iterator[os.stat_result]:
    """Of a file, or of a folder and all that is in it; what is gone meanwhile is left out."""
    inside = (Path(at, name) for at, *names in os.walk(place) for name in itertools.chain(*names))
    for path in itertools.chain([place], inside):
        with contextlib.suppress(OSError):  # it is being built
            yield path.stat()


def _copy(source: Path, out: Path) -> None:
    """Copy a sealed stage, without its checkpoints."""
    top = str(source)
    shutil.copytree(
        source, out, ignore=lambda at, _: [CHECKPOINTS] if at == top else [], dirs_exist_ok=True
    )
    _sync(out)


def _reached(partial: Path) -> tuple[str, int]:
    """How far an unfinished stage is: the step of its newest checkpoint, and the bytes beside the
    checkpoints, such as rows that were measured."""
    inside = partial / CHECKPOINTS
    names = [seal.parent.name for seal in inside.glob(f"*/{SEAL}")]
    files = [*inside.glob("*"), *partial.glob("*")]
    newest = max(filter(str.isdigit, names), default="")
    return newest, sum(file.stat().st_size for file in files if file.is_file())


def _transfer(source: Path, target: Path) -> None:
    """Copy an unfinished stage to another disk, with the newest of its checkpoints, unless it is as
    far there. What is in its place goes once all is copied."""
    if _reached(source) <= _reached(target):
        return
    checkpoints, (newest, _) = source / CHECKPOINTS, _reached(source)

    def unneeded(at: str, names: list[str]) -> list[str]:
        inside = [Path(at, name) for name in names]
        if Path(at) == source:
            return [path.name for path in inside if _UNIQUE.fullmatch(path.name)]
        others = [path.name for path in inside if path.is_dir() and path.name != newest]
        return others if Path(at) == checkpoints else []

    with _attempt(target) as copied:
        shutil.copytree(source, copied, ignore=unneeded, dirs_exist_ok=True)
        for part in (copied, copied / CHECKPOINTS):
            _sync(part)
        for new in copied.iterdir():
            if (old := target / new.name).is_dir():
                shutil.rmtree(old)
            new.replace(old)


def _rename(folder: Path, path: Path) -> None:
    """Rename a sealed folder into place, or leave it if another host was faster."""

    def rename() -> None:
        try:
            folder.replace(path)
        except OSError:
            if not (path.exists() and intact(path)):
                raise

    patiently(rename)
    sync_path(path.parent)


def _mark_used(path: Path) -> None:
    """Let the seal's date tell when the stage was last used, to an hour."""
    mark_recent(path / SEAL)


def mark_recent(file: Path) -> None:
    """Set a file's date to now, if it is more than an hour old."""
    with contextlib.suppress(OSError):  # of another user, or on a read-only disk
        if time.time() - file.stat().st_mtime > _HOUR:
            os.utime(file)


def _sync(folder: Path) -> None:
    """Have a large folder written to the disk, but not its checkpoints: after a power cut, files
    may have the right size and nothing in them. In a smaller one, their hashes tell."""
    found = list[Path]()
    for at, inside, names in os.walk(folder):
        if Path(at) == folder:
            inside[:] = [name for name in inside if name != CHECKPOINTS]
        found += [Path(at), *(Path(at, name) for name in names)]
    if sum(path.stat().st_size for path in found) > _HASHED_ON_READ:
        for path in found:
            sync_path(path)


def sync_path(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
