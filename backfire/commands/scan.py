"""`backfire scan`: which rows of a data set may be poisoned, or should not be learned."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from backfire.base import ModelScanner, Row, Scanner
from backfire.commands.asked import asked_of, find_model
from backfire.commands.files import dataset_spec
from backfire.commands.options import echo
from backfire.data.jsonl import to_record
from backfire.errors import UserError
from backfire.recipe import parse_edit
from backfire.registry import build, find, names
from backfire.scan.engine import kept, scan
from backfire.scan.output import as_csv, as_json, as_table
from backfire.scan.page import write_page
from backfire.scan.source import open_rows
from backfire.store import unique
from backfire.text import count

_IDLE = ("train", "test", "hub", "rows", "test_rows", "seed", "group", "test_split", "test_share")
"""Knobs of files and hub sets that do not matter here: the data is named, and read as a whole."""


def start(
    data: str,
    edits: Sequence[str],
    *,
    test: str | None,
    scanners: Sequence[str],
    form: Literal["table", "json", "csv"],
    out: Path | None,
    remove: str | None,
    write: Path | None,
    top: int,
    model: str | None = None,
    limit: int = 2000,
    device: str = "auto",
) -> list[str]:
    """Scan the rows, print what is found, and write the page and the rows that are left; returns
    one sentence for each written file."""
    share = _share(remove, write)
    _check_paths(data, out, write)
    knobs, chosen = _settings(edits, scanners, with_model=model is not None)
    place = None if model is None else find_model(model, device)
    source = open_rows(_spec(data, knobs))
    others = open_rows(_spec(test, knobs), "test") if test else None
    asked = asked_of(*place, limit) if place else None
    found = scan(data, source, chosen, test=others, top=top, asked=asked)
    if form == "table":
        echo(as_table(found))
    else:
        hits = found.hits[:top]
        echo((as_json(hits) if form == "json" else as_csv(hits)).rstrip("\n"))
    done = []
    if out:
        write_page(found, out)
        done.append(f"Wrote {out}.")
    if write:
        rows, gone = kept(found, share)
        _write(rows, write)
        flagged = sum(found.flags[place] for place in gone)
        left = count(source.count - len(gone), "row")
        removed = f"{count(len(gone), 'row')} removed ({flagged:,} of them flagged)"
        done.append(f"Wrote {write}: {left}; {removed}.")
    return done


def _share(remove: str | None, write: Path | None) -> float | None:
    """`--remove 5%` as a share; None means the flagged rows."""
    if remove is None:
        return None
    if write is None:
        raise UserError("--remove says what --write leaves out; add --write clean.jsonl.")
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", remove.strip())
    if not match or not 0 < float(match[1]) < 100:
        raise UserError(f"--remove is a share of the rows, as in 5% (got {remove}).")
    return float(match[1]) / 100


def _check_paths(data: str, out: Path | None, write: Path | None) -> None:
    if out and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The output is a page, so --out must end in .html (got {out}).")
    if write and write.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"The output is JSON lines, so --write must end in .jsonl (got {write}).")
    for path in filter(None, (out, write)):
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a file.")
    source = Path(data).expanduser()
    if write and write.exists() and source.exists() and write.samefile(source):
        raise UserError(f"{write} is the input file; choose another path with --write.")


def _settings(
    edits: Iterable[str], wanted: Sequence[str], *, with_model: bool
) -> tuple[dict[str, Any], list[Scanner]]:
    """The knobs of the data, and the scanners with theirs; an edit is data.KNOB or SCANNER.KNOB."""
    chosen = [find("scanners", name).name for name in wanted] or [
        name for name in names("scanners") if with_model or not _asks(name)
    ]
    if not with_model and (asking := [name for name in chosen if _asks(name)]):
        raise UserError(f"scanner '{asking[0]}' requires a model; name one, as in --model sandbox.")
    if with_model and not any(map(_asks, chosen)):
        raise UserError("--model has no effect, since no scanner that is chosen requires a model.")
    data: dict[str, Any] = {}
    specs: dict[str, dict[str, Any]] = {name: {"name": name} for name in chosen}
    for key, value in map(parse_edit, edits):
        head, _, knob = key.partition(".")
        if not knob:
            raise UserError(f"An edit of a scan is data.KNOB=... or SCANNER.KNOB=... (got {key}).")
        if head == "data":
            data[knob] = value
            continue
        name = find("scanners", head).name
        if name not in specs:
            why = f", since --scanner leaves out '{name}'" if wanted else " without --model"
            raise UserError(f"{key} has no effect{why}.")
        specs[name][knob] = value
    return data, [build("scanners", spec) for spec in specs.values()]


def _asks(name: str) -> bool:
    """Whether this scanner requires a model."""
    return issubclass(find("scanners", name), ModelScanner)


def _spec(data: str, knobs: dict[str, Any]) -> dict[str, Any]:
    spec = {**dataset_spec(data), **knobs}
    if spec["name"] == "files" and (idle := [knob for knob in knobs if knob in _IDLE]):
        raise UserError(f"data.{idle[0]} has no effect on a scan, which reads all rows.")
    return spec


def _write(rows: Iterable[Row], path: Path) -> None:
    """Write one record per line, row by row; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{unique()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(to_record(row), ensure_ascii=False) + "\n")
        os.replace(temporary, path)  # noqa: PTH105
    finally:
        temporary.unlink(missing_ok=True)
