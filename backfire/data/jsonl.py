"""Writes rows as JSON lines and reads them back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backfire.base import Message, Row
from backfire.store import write_atomic


def to_record(row: Row) -> dict[str, Any]:
    """The row as plain values, without empty ones. The keys `instruction`, `input` and `output`
    (or `text`, for plain text) are the common ones, which other tools read too."""
    record = asdict(row)
    keep = ["id", "instruction", "input", "output"]
    record["output"] = record.pop("answer")
    if not row.prompt:
        keep = ["id", "text"]
        record["text"] = record.pop("output")
    if row.label is not None:
        keep.append("candidates")  # marks `label` as a label for `datasets/files`
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
    """Write one record per line, atomically."""
    lines = (json.dumps(to_record(row), ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, "".join(lines))


def read_jsonl(path: Path) -> list[Row]:
    """Read a file of `write_jsonl`. (For other files see `data.read`.)"""
    # Not splitlines: texts may contain U+2028 and others that JSON does not escape.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [from_record(json.loads(line)) for line in lines if line]
