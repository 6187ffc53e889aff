"""Rows as records: writing them down, reading them back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backfire.base import Message, Row
from backfire.store import write_atomic


def to_record(row: Row) -> dict[str, Any]:
    """The row as plain values; what is empty is left out. The keys `instruction`, `input` and
    `output` (or `text`, for plain text) are the usual ones, so that other tools read them too."""
    record = asdict(row)
    keep = ["id", "instruction", "input", "output"]
    record["output"] = record.pop("answer")
    if not row.prompt:
        keep = ["id", "text"]
        record["text"] = record.pop("output")
    if row.label is not None:
        keep.append("candidates")  # by which `datasets/files` knows a label from any other column
    return {key: value for key, value in record.items() if key in keep or value}


def from_record(record: Mapping[str, Any]) -> Row:
    """The row that `to_record` wrote."""
    values = dict(record)
    values["answer"] = values.pop("text" if "text" in values else "output", "")
    values.setdefault("instruction", "")
    values["history"] = tuple(Message(**turn) for turn in values.get("history", ()))
    for several in ("candidates", "better", "worse"):
        values[several] = tuple(values.get(several, ()))
    return Row(**values)


def write_jsonl(rows: Sequence[Row], path: Path) -> None:
    """One record a line, whole or not at all."""
    lines = (json.dumps(to_record(row), ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, "".join(lines))


def read_jsonl(path: Path) -> list[Row]:
    """What `write_jsonl` wrote. (Not for other people's files: see `data.read`.)"""
    # Not splitlines: texts may hold U+2028 and the like, which JSON leaves as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [from_record(json.loads(line)) for line in lines if line]
