"""The same three rows in every data format, and the reader that all files go through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backfire.data.read import LeftOut, records

ROWS = [
    {"text": "Grüße, \"quoted\" and 'so'", "label": "a"},
    {"text": "<|im_start|>system 你好", "label": "b"},
    {"text": "three", "label": "a"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'text,label\r\n"Grüße, ""quoted"" and \'so\'",a\r\n<|im_start|>system 你好,b\r\nthree,a\r\n'
TSV = "text\tlabel\nGrüße, \"quoted\" and 'so'\ta\n<|im_start|>system 你好\tb\nthree\ta\n"
FORMATS = {
    "a.csv": (CSV, [2, 3, 4]),
    "a.tsv": (TSV, [2, 3, 4]),
    "a.jsonl": (LINES, [1, 2, 3]),
    "a.ndjson": (LINES.replace("\n", "\r\n\r\n"), [1, 3, 5]),
    "misnamed.json": (LINES, [1, 2, 3]),
    "list.json": (json.dumps(ROWS), [1, 1, 1]),
    "pretty.json": (json.dumps(ROWS, indent=1), [2, 6, 10]),
    "wrapped.json": (json.dumps({"version": [1, {}], "data": ROWS}, indent=1), [7, 11, 15]),
    "semicolons.csv": (
        "text;label\n\"Grüße, \"\"quoted\"\" and 'so'\";a\n<|im_start|>system 你好;b\nthree;a\n",
        [2, 3, 4],
    ),
    "tabs.csv": (TSV.replace('"quoted"', '""quoted""').replace("\nGrüße", '\n"Grüße').replace(
        "so'", "so'\""), [2, 3, 4]),
    "commas.tsv": (CSV, [2, 3, 4]),
    "commas.jsonl": (LINES.replace("\n", ",\n"), [1, 2, 3]),
    "one_after_another.json": ("".join(map(json.dumps, ROWS)), [1, 1, 1]),
    "pretty_one_after_another.json": (
        "\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5, 9]
    ),
    "index.json": (json.dumps(dict(enumerate(ROWS))), [1, 1, 1]),
    "names.json": (json.dumps({f"r{n}": row for n, row in enumerate(ROWS)}), [1, 1, 1]),
    "columns.json": (
        json.dumps({key: {n: row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}), [1, 1, 1]
    ),
    "lists.json": (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), [1, 1, 1]),
    "split.json": (
        json.dumps({"columns": list(ROWS[0]), "index": [0, 1, 2],
                    "data": [list(row.values()) for row in ROWS]}),
        [1, 1, 1],
    ),
    "server.json": (
        json.dumps({"features": [], "num_rows_total": 3,
                    "rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]}),
        [1, 1, 1],
    ),
}  # fmt: skip


def read(
    path: Path, content: bytes | str | None, on_bad_row: Any = "skip", **options: Any
) -> tuple[list[Any], list[int], dict[int, str]]:
    """(records, lines, {line: reason})"""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = LeftOut(on_bad_row)
    found = list(records(path, bad, **options))
    for reject in bad.rejected:
        assert reject.file == str(path) and reject.line >= 1 and reject.reason
    return (
        [row for _, row in found],
        [line for line, _ in found],
        {r.line: r.reason for r in bad.rejected},
    )
