"""Locks of files and folders that several processes write, on one host or on several.

The system's lock (flock) is free at once when its holder dies. Some shared disks refuse it (NFS
without a lock service, some FUSE), and others keep it to one host and say nothing (`nolock`,
`localflock`). There a claim with a heartbeat, as of a job, takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from backfire import progress
from backfire.claims import Claims
from backfire.errors import Busy

_REFUSED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock where the file system has no locks."""
_POLL = 0.05  # seconds between two looks at what another has


@contextlib.contextmanager
def locked(path: Path, *, waits: bool = True, across_hosts: bool = False) -> Iterator[None]:
    """Hold the lock `<path>.lock`, in a folder that exists.

    Args:
        waits: wait for another holder, as long as a worker need not stop; otherwise `Busy` is
            raised.
        across_hosts: what is written suffers from two writers, so there is a claim in any case.

    Raises:
        Busy: another process has the lock; the message names the path and its host.
    """
    with contextlib.ExitStack() as held:
        if not _flock(held, path, waits) or across_hosts:
            _claim(held, path, waits)
        yield


def _flock(held: contextlib.ExitStack, path: Path, waits: bool) -> bool:
    """Take the system's lock; whether there is one. The file names the host of its holder."""
    from filelock import FileLock, Timeout

    lock = FileLock(file := f"{path}.lock", timeout=0, fallback_to_soft=False)
    while True:
        try:
            held.enter_context(lock)
            break
        except Timeout:
            if not waits:
                host = ""
                with contextlib.suppress(OSError, ValueError):
                    host = Path(file).read_text(encoding="utf-8")
                raise _busy(path, host) from None
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise
        _wait()
    with contextlib.suppress(OSError):
        Path(file).write_text(socket.gethostname(), encoding="utf-8")
    return True


def _claim(held: contextlib.ExitStack, path: Path, waits: bool) -> None:
    claims, name = Claims(path.parent, folder=""), f"{path.name}.claim"
    while (claim := claims.take(name)) is None:
        if not waits:
            holder = claims.read(name)
            raise _busy(path, holder.host if holder else "")
        _wait()
    held.callback(claim.release)


def _wait() -> None:
    progress.waits()
    time.sleep(_POLL)


def _busy(path: Path, host: str) -> Busy:
    return Busy(f"{path.parent.name} {path.name} on {host or 'another host'}")
