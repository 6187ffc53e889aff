"""Reads a run folder: its cells, one record per number, and the numbers over seeds.

`records` is the stable contract for other programs. Nothing here imports torch or plots.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from backfire import text
from backfire.errors import UserError
from backfire.results.groups import KNOBS, Cell, Group, group
from backfire.results.plugins import lacking

Record = dict[str, Any]

IDENTITY: Final = ("cell", "key", "recipe", *KNOBS, "seed")
NUMBERS: Final = ("metric", "value", "low", "high", "n", "direction")
FIELDS: Final = (*IDENTITY, *NUMBERS, "status")


def load(run: Path) -> list[Cell]:
    """Every cell of the run: what its result or error says, its `status`, `settings` and `folder`.

    Where `run.json` says which cells the recipe has now, those it lacks are left out, and those not
    begun yet are there as `unfinished`, with nothing known but their name and key.
    """
    planned, found = _planned(run), set(_folders(run))
    if not planned and not found:
        raise UserError(f"No cells in {run}; it is not a run folder, or nothing was run yet.")
    return sorted((cell(run / "cells" / name) for name in planned or found), key=_order)


def left_out(run: Path) -> int:
    """How many finished cells lie in the folder that the recipe no longer has."""
    planned = _planned(run)
    return len(set(_folders(run)) - set(planned)) if planned else 0


def _folders(run: Path) -> list[str]:
    folders = (path for path in (run / "cells").glob("*") if path.is_dir())
    return [folder.name for folder in folders if not folder.name.startswith(".")]


def _planned(run: Path) -> list[str]:
    """The folder names of the cells the recipe has now; empty if it is not written down."""
    try:
        names = (read(run / "run.json") or {}).get("cells") or []
        return [name for name in names if Path(name).name == name]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def records(run: Path) -> list[Record]:
    """One object per cell and metric with exactly `FIELDS`; a cell without numbers gives one whose
    metric is null."""
    found = []
    for item in load(run):
        identity = {field: item[field] for field in IDENTITY}
        for value in item["values"] or [dict.fromkeys(NUMBERS)]:
            found.append({**identity, **value, "status": item["status"]})
    return found


def summary(run: Path) -> list[Group]:
    """Cells that differ only in their seed, with the mean, spread, interval and number of seeds of
    each metric."""
    return group(load(run))


def write(records: Sequence[Record], format: Literal["table", "json", "csv"] = "table") -> str:
    """The records as text: aligned columns, strict JSON, or CSV that no spreadsheet computes."""
    if format == "json":
        return json.dumps(list(records), indent=1, allow_nan=False) + "\n"
    if format == "csv":
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(FIELDS)
        rows.writerows([_harmless(record[field]) for field in FIELDS] for record in records)
        return out.getvalue()
    if format == "table":
        from backfire.terminal import columns

        shown = [field for field in FIELDS if field not in ("key", "recipe")]
        return columns(shown, [[brief(record[field]) for field in shown] for record in records])
    raise UserError(f"Unknown format '{format}'; known: csv, json, table.")


def cell(folder: Path) -> Cell:
    """One cell folder; a file that can not be read makes the cell a failed one and stops nobody."""
    known, settings = outcome(folder), _settings(folder)
    slug, _, key = folder.name.rpartition("-")
    found: Cell = {"cell": slug, "key": key, "recipe": folder.parent.parent.name, "status": "ok"}
    found |= {knob: settings.get(f"{knob}.name", settings.get(knob)) for knob in KNOBS}
    found |= {"rate": settings.get("attack.rate"), "seed": settings.get("seed"), **known}
    found |= {"rate": finite(found["rate"]), "seed": finite(found["seed"])}
    if "attack.name" in settings:
        # Component knobs at their default are not written down; this one is known all the same.
        settings.setdefault("attack.rate", found["rate"])
    found["values"] = [_value(value) for value in known.get("values") or []]
    found["axes"] = known.get("axes") or {}
    lacking([found])  # installed plug-ins that the cell was run with are loaded
    return {**found, "settings": settings, "folder": str(folder)}


def outcome(folder: Path) -> dict[str, Any]:
    """What the cell's result or error says; `status` is `unfinished` if there is neither."""
    try:
        known = read(folder / "result.json") or read(folder / "error.json")
        if known is None or known == {}:
            return {"status": "unfinished"}
        if not _is_outcome(known):
            raise ValueError("it is no result of this program")
    except (OSError, ValueError, RecursionError) as error:
        sentence = f"What it wrote can not be read: {error}."
        return {"status": "failed", "error": sentence, "next": "Run the same command again."}
    return dict(known)


def _is_outcome(known: Any) -> bool:
    """Whether it has the form of a result: texts, and values that are records."""
    return (
        isinstance(known, dict)
        and all(isinstance(known.get(field) or "", str) for field in ("cell", "key", "status"))
        and isinstance(known.get("axes") or {}, dict)
        and isinstance(known.get("values") or [], list)
        and all(isinstance(value, dict) for value in known.get("values") or [])
    )


def read(path: Path) -> Any:
    """A JSON file, where NaN becomes null; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return None


def finite(value: Any) -> float | None:
    """The number, or None where a file holds something else (text, infinity)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _settings(folder: Path) -> dict[str, Any]:
    """The resolved experiment of a cell folder as dotted keys."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        tree = yaml.load((folder / "experiment.yaml").read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(_dotted(tree, ""))


def _dotted(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _dotted(item, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value


def _value(value: Mapping[str, Any]) -> Record:
    numbers = {field: finite(value.get(field)) for field in ("value", "low", "high", "n")}
    direction = value.get("direction") or "none"
    return {"metric": str(value.get("metric")), **numbers, "direction": direction}


def _order(item: Cell) -> tuple[Any, ...]:
    """Untuned before tuned, clean before poisoned, then by rate: the order of every table."""
    named = {knob: (item[knob] not in ("none", None), str(item[knob])) for knob in KNOBS}
    axes, settings = (
        str({key: value for key, value in item[kind].items() if key != "seed"})
        for kind in ("axes", "settings")
    )
    return (
        item["model"] is None,
        *(named[knob] for knob in ("model", "data")),
        named["method"][0],
        *(named[knob] for knob in ("attack", "method", "defense")),
        *(item["rate"] or 0.0, axes, settings, item["seed"] or 0, item["key"]),
    )


def brief(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else text.line(value)


def _harmless(value: Any) -> Any:
    """A CSV cell: text that a spreadsheet would compute gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    plain = text.clean(value)
    risky = plain.startswith(("=", "+", "-", "@", "\t")) or value.startswith("\r")
    return f"'{plain}" if risky else plain
