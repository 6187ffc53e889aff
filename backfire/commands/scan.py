"""`backfire scan`: which rows of a data set may be poisoned, or should not be learned."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from backfire.base import ModelScanner, Scanner
from backfire.commands.asked import asked_of, find_model
from backfire.commands.files import check_other, dataset_spec, same_file, spec_with
from backfire.commands.options import echo
from backfire.errors import UserError
from backfire.recipe import parse_edit
from backfire.registry import build, find, names
from backfire.scan.engine import removed, scan
from backfire.scan.output import as_csv, as_json, as_notes, as_table
from backfire.scan.page import write_page
from backfire.scan.rest import check_format, write_rest
from backfire.scan.source import open_rows
from backfire.text import count
from backfire.yaml12 import read_yaml

_LIMIT = 2000
"""Most rows that a model reads by default."""


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
    limit: int | None = None,
    template: str | None = None,
    device: str | None = None,
) -> list[str]:
    """Scan the rows, print what is found, and write the page and the rows that are left; returns
    one sentence for each written file."""
    share = _share(remove, write)
    given = {"model": model is not None, "test": test is not None}
    knobs, chosen = _settings(edits, scanners, given)
    _check_paths(data, test, knobs, out, write)
    of_model = {"--limit": limit, "--template": template, "--device": device}
    if model is None and (idle := [name for name, value in of_model.items() if value is not None]):
        raise UserError(f"{idle[0]} has no effect without --model.")
    layout = build("templates", read_yaml(template, "--template")) if template else None
    place = None if model is None else find_model(model, device or "auto")
    source = open_rows(_spec(data, knobs, test))
    others = None if test is None else open_rows(_spec(test, knobs, test), "test")
    asked = asked_of(*place, limit or _LIMIT, layout) if place else None
    found = scan(data, source, chosen, test=others, top=top, asked=asked)
    found.notes += [f"{test}: {sentence}" for sentence in (others.notes if others else ())]
    if form == "table":
        echo(as_table(found))
    else:
        hits = found.hits[:top]
        echo((as_json(hits) if form == "json" else as_csv(hits)).rstrip("\n"))
        print(as_notes(found, len(hits)), file=sys.stderr)  # noqa: T201
    done = []
    if out:
        write_page(found, out)
        done.append(f"Wrote {out}.")
    if write:
        gone = removed(found, share)
        left = write_rest(source, gone, write)
        flagged = sum(found.flags[place] for place in gone)
        done.append(
            f"Wrote {write}: {count(left, 'row')}; {count(len(gone), 'row')} removed "
            f"({flagged:,} of them flagged){_more(source.count - left - len(gone))}."
        )
    return done


def _more(rows: int) -> str:
    return f", and {count(rows, 'row')} more of the same records" if rows else ""


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


def _check_paths(
    data: str, test: str | None, knobs: dict[str, Any], out: Path | None, write: Path | None
) -> None:
    if out and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The output is a page, so --out must end in .html (got {out}).")
    if write:
        check_format(data, write)
    named = [knobs.get(knob) for knob in ("train", "test")]
    inputs = [
        data,
        test,
        *(path for one in named for path in (one if type(one) is list else [one])),
    ]
    for option, path in (("--out", out), ("--write", write)):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a file.")
        if any(isinstance(one, str) and same_file(one, path) for one in inputs):
            raise UserError(f"{path} is an input file; choose another path with {option}.")
    if test is not None:
        check_other("--test", test, data, knobs)


def _settings(
    edits: Iterable[str], wanted: Sequence[str], given: Mapping[str, bool]
) -> tuple[dict[str, Any], list[Scanner]]:
    """The knobs of the data, and the scanners with theirs; an edit is data.KNOB or SCANNER.KNOB.
    `given` says whether there are a model and test rows, which some scanners require."""
    lacking = {name: need for name in names("scanners") if (need := _lacking(name, given))}
    chosen = [find("scanners", name).name for name in wanted] or [
        name for name in names("scanners") if name not in lacking
    ]
    if unable := [name for name in chosen if name in lacking]:
        raise UserError(f"scanner '{unable[0]}' requires {_REQUIRED[lacking[unable[0]]]}.")
    if given["model"] and not any(map(_asks, chosen)):
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
            left_out = f", since --scanner leaves out '{name}'"
            why = left_out if wanted else f" without --{lacking[name]}"
            raise UserError(f"{key} has no effect{why}.")
        specs[name][knob] = value
    return data, [build("scanners", spec) for spec in specs.values()]


def _asks(name: str) -> bool:
    """Whether this scanner requires a model."""
    return issubclass(find("scanners", name), ModelScanner)


_REQUIRED = {
    "model": "a model; name one, as in --model sandbox",
    "test": "test rows; name them by --test",
}


def _lacking(name: str, given: Mapping[str, bool]) -> str:
    """What this scanner requires and is not given, or nothing."""
    required = {"model": _asks(name), "test": find("scanners", name).needs_test}
    return next((need for need, is_needed in required.items() if is_needed and not given[need]), "")


def _spec(data: str, knobs: dict[str, Any], test: str | None) -> dict[str, Any]:
    spec = spec_with(data, knobs, "a scan")
    is_split = test is not None and "hub" in dataset_spec(test)
    if spec["name"] == "files" and "test_split" in knobs and not is_split:
        raise UserError("data.test_split has no effect without a hub set in --test.")
    return spec
