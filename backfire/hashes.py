"""SHA-256 of input files. A large one is read once for all processes that share a cache.

Its hash is stored under the file's path, inode, size, and times of modification and change. Nobody
can set the last one, so a file that is written again has no stored hash.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from backfire.store import cache_root, digest, mark_recent, sha256, write_atomic

FOLDER = "hashes"
"""Subfolder of the cache: a file for each hash."""
_LARGE = 2**24  # bytes; every process reads smaller files itself
_SETTLED = 10.0
"""Seconds since its last change after which the hash of a file is stored: a second change may come
before a file system's clock moves on."""

Stamp = tuple[int, int, int, int]


def stamp(stat: os.stat_result) -> Stamp:
    """Differs for a file that was written again."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def file_hash(file: Path) -> str:
    """SHA-256 of the file; read again only if it has changed."""
    return _hash(str(file.resolve()), stamp(file.stat()))


@lru_cache(maxsize=1024)
def _hash(path: str, state: Stamp) -> str:
    if state[0] < _LARGE:
        return sha256(Path(path))
    known = cache_root() / FOLDER / digest([path, state], length=32)
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", found := known.read_text(encoding="ascii")):
            mark_recent(known)
            return found
    found, after = sha256(Path(path)), Path(path).stat()
    if stamp(after) == state and time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED:
        with suppress(OSError):  # a cache that cannot be written
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known, found)
    return found
