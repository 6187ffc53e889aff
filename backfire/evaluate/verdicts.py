"""Verdicts of a judge on many exchanges, cached on disk.

A verdict is asked for once: equal exchanges share one, and what was judged before, by this run or
another, is read from the cache. It is keyed by the judge's identity and by all that it looks at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from backfire import stages
from backfire.base import Exchange, Judge, Verdict
from backfire.progress import Progress, silent
from backfire.store import digest


def judged(
    judge: Judge,
    exchanges: Sequence[Exchange],
    folder: Path,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> list[Verdict]:
    """One verdict for each exchange, in order; only those not in `folder` are asked for.

    Each batch is on disk before the next is asked for, so an interruption costs one batch.
    """
    stage = stages.judged(judge)
    file = folder / f"{stage.slug}-{stage.key}.jsonl"
    known = _read(file)
    keys = [_key(judge, exchange) for exchange in exchanges]
    missing = {
        key: exchange for key, exchange in zip(keys, exchanges, strict=True) if key not in known
    }
    todo = list(missing.items())
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        progress(start, len(todo), f"judge {judge.name}")
        verdicts = judge.judge([exchange for _, exchange in batch])
        fresh = {key: verdict for (key, _), verdict in zip(batch, verdicts, strict=True)}
        _append(file, fresh)
        known.update(fresh)
    return [known[key] for key in keys]


def _key(judge: Judge, exchange: Exchange) -> str:
    read = {name: exchange.fields.get(name) for name in judge.reads}
    return digest([exchange.prompt, exchange.reply, read], length=32)


def _append(file: Path, verdicts: Mapping[str, Verdict]) -> None:
    """Add lines at the end, on disk when this returns; others may be adding at the same time."""
    from filelock import FileLock

    lines = [json.dumps({"key": key, **asdict(verdict)}) for key, verdict in verdicts.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"), file.open("a+b") as stream:
        # What a killed run left of its last line must not swallow the next one.
        torn = stream.seek(0, os.SEEK_END) and not _ends_in_newline(file)
        stream.write(("\n" * torn + "\n".join(lines) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def _ends_in_newline(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def _read(file: Path) -> dict[str, Verdict]:
    """The verdicts in a cache file; a line that was not written whole is as good as missing."""
    found: dict[str, Verdict] = {}
    if not file.is_file():
        return found
    for line in file.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            found[key] = Verdict(**entry)
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return found
