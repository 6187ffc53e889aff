"""Files of JSON lines that grow while work goes on. A line that a kill has cut short is ignored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backfire.patience import patiently


def append(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append entries and flush them to disk. One process at a time may do so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    patiently(lambda: _append(file, text))


def _append(file: Path, text: str) -> None:
    with file.open("a+b") as stream:
        torn = False
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"  # it must not swallow the next line
        stream.write(("\n" * torn + text).encode())
        stream.flush()
        os.fsync(stream.fileno())


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """The whole entries of a file; none if it is absent."""
    try:
        lines = patiently(file.read_bytes).split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
