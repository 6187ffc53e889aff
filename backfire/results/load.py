"""Reading of a run folder: its cells (`CellResult`), one record per number, means over seeds.

`records` is the stable contract for other programs. Nothing here imports torch or plots.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

from backfire import text
from backfire.errors import UserError
from backfire.result import CellResult, Check, Direction, PoisonCounts, Role, Unit, Value
from backfire.results.adapter import present
from backfire.results.groups import KNOBS, Group, group, name, varying
from backfire.results.plugins import lacking
from backfire.store import read_json

Record = dict[str, Any]

IDENTITY: Final = ("cell", "key", "recipe", *KNOBS, "seed")
NUMBERS: Final = ("metric", "value", "low", "high", "n", "direction")
SHAPE: Final = ("unit", "role", "family", "part")
FIELDS: Final = (*IDENTITY, *NUMBERS, "status", *SHAPE)
SPREAD: Final = ("spread", "seeds", "scope")
MEANS: Final = ("group", *KNOBS, *NUMBERS, *SPREAD, *SHAPE)
_DEEPEST: Final = 20
_LARGEST: Final = 100_000
"""Most levels and values of the settings of a cell."""
_KNOBS: Final = 3
_WIDEST: Final = 80
"""Most settings, and characters of them, in the title of a cell."""


def load(run: Path) -> list[CellResult]:
    """Every cell of the run.

    If `run.json` lists the recipe's current cells, others are left out, and those not begun yet are
    `unfinished`, with only their name and key.
    """
    names = _planned(run) or _folders(run)
    if not names:
        raise UserError(f"No cells in {run}; it is not a run folder, or nothing was run yet.")
    return sorted((cell(run / "cells" / name) for name in set(names)), key=_order)


def left_out(run: Path) -> int:
    """Number of cells in the folder that the recipe no longer has."""
    planned = _planned(run)
    return len(set(_folders(run)) - set(planned)) if planned else 0


def _folders(run: Path) -> list[str]:
    folders = (path for path in (run / "cells").glob("*") if path.is_dir())
    return [folder.name for folder in folders if not folder.name.startswith(".")]


def _planned(run: Path) -> list[str]:
    """The folder names of the recipe's current cells; empty if `run.json` does not list them."""
    try:
        names = (read(run / "run.json") or {}).get("cells") or []
        return [name for name in names if Path(name).name == name]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def records(run: Path) -> list[Record]:
    """`records_of` every cell of the run."""
    return records_of(load(run))


def records_of(cells: Iterable[CellResult]) -> list[Record]:
    """One object per cell and metric with exactly `FIELDS`; a cell without numbers gives one whose
    metric is null."""
    rows = []
    for item in cells:
        for value in item.values or (None,):
            numbers = {field: getattr(value, field, None) for field in (*NUMBERS, *SHAPE)}
            record = {**identity(item), **numbers, "status": item.status}
            rows.append({field: record[field] for field in FIELDS})
    return rows


def identity(item: CellResult) -> Record:
    """The fields `IDENTITY` of a cell."""
    return {"cell": item.slug, **{field: getattr(item, field) for field in IDENTITY[1:]}}


def titles(cells: Sequence[CellResult]) -> list[str]:
    """The name of each cell; where several have the same one, with the settings that tell them
    apart: `reviews-badnets-0.05-lora-s0 (attack.label_mode=clean)`."""
    alike: dict[str, list[CellResult]] = {}
    for cell in cells:
        alike.setdefault(cell.slug, []).append(cell)
    return [_title(cell, alike[cell.slug]) for cell in cells]


def _title(cell: CellResult, alike: Sequence[CellResult]) -> str:
    if len(alike) == 1:
        return cell.slug
    known = [one.settings for one in alike if one.settings]
    keys = [key for key in cell.settings if key.partition(".")[0] != "metrics"]
    differ = [key for key in keys if len({text.knob(one.get(key)) for one in known}) > 1]
    own = [f"{text.line(key)}={text.knob(cell.settings[key])}" for key in differ[:_KNOBS]]
    return f"{cell.slug} ({text.cut(', '.join(own), _WIDEST) or cell.key})"


def summary(run: Path) -> list[Group]:
    """Cells that differ only in their seed, with the mean, spread, interval and number of seeds of
    each metric."""
    return group(load(run))


def distinct_warnings(cells: Iterable[CellResult]) -> list[tuple[str, str]]:
    """Each warning once, with its cell or the number of its cells."""
    by_warning: dict[str, list[str]] = {}
    cells = list(cells)
    for cell, title in zip(cells, titles(cells), strict=True):
        for warning in cell.warnings:
            by_warning.setdefault(text.cut(text.line(warning), 400), []).append(title)
    return [
        (warning, names[0] if len(names) == 1 else text.count(len(names), "cell"))
        for warning, names in by_warning.items()
    ]


def over_seeds(groups: Sequence[Group]) -> list[Record]:
    """One object per group and metric with exactly `MEANS`: the mean over the seeds, its interval,
    the standard deviation between seeds, and the scope of the interval (see `groups.Scope`)."""
    columns, rows = varying(groups), []
    for item in groups:
        whole = {"group": name(item, columns), **{knob: getattr(item, knob) for knob in KNOBS}}
        for stat in item.stats.values():
            numbers = {field: getattr(stat, field, None) for field in (*NUMBERS, *SPREAD, *SHAPE)}
            rows.append({**whole, **numbers})
    return rows


def write(
    records: Sequence[Record],
    format: Literal["table", "json", "csv"] = "table",
    fields: Sequence[str] = FIELDS,
) -> str:
    """The records as text: aligned columns, strict JSON, or CSV without spreadsheet formulas."""
    if format == "json":
        return json.dumps(list(records), indent=1, allow_nan=False) + "\n"
    if format == "csv":
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(fields)
        rows.writerows([text.csv_field(record[field]) for field in fields] for record in records)
        return out.getvalue()
    if format == "table":
        from backfire.terminal import columns

        shown = [field for field in fields if field not in ("key", "recipe", *SHAPE)]
        return columns(shown, [[brief(record[field]) for field in shown] for record in records])
    raise UserError(f"Unknown format '{format}'; known: csv, json, table.")


def cell(folder: Path) -> CellResult:
    """Read a cell folder; the status is `failed` if its result cannot be read."""
    content, settings = outcome(folder), _settings(folder)
    slug, _, key = folder.name.rpartition("-")
    fields = {knob: settings.get(f"{knob}.name", settings.get(knob)) for knob in KNOBS}
    fields |= {"rate": settings.get("attack.rate"), "seed": settings.get("seed")}
    fields |= {"cell": slug, "key": key, "recipe": folder.parent.parent.name, **content}
    rate, seed = finite(fields["rate"]), finite(fields["seed"])
    if "attack.name" in settings:
        # Knobs at their default are not written down.
        settings.setdefault("attack.rate", rate)
    axes, rows = _table(fields.get("axes")), _table(fields.get("rows"))
    fields["axes"] = {key: _resolved(key, value, settings) for key, value in axes.items()}
    texts = ("key", "recipe", "model", "data", "attack", "method", "defense", "template")
    tables = ("axes", "evaluate", "keys")
    result = CellResult(
        slug=str(fields["cell"] or slug),
        **_each(str, fields, (*texts, "status", "error", "next")),
        **_each(_table, fields, tables),
        rows={k: int(v) for k, v in rows.items() if finite(v) is not None},
        rate=rate,
        seed=None if seed is None else int(seed),
        values=tuple(map(_value, content.get("values") or ())),
        warnings=tuple(map(str, content.get("warnings") or ())),
        cut_share=finite(content.get("cut_share")),
        preflight=tuple(_check(c) for c in content.get("preflight") or () if isinstance(c, dict)),
        poison=_poison(content.get("poison")),
        train=_table(content.get("train")) or None,
        versions={kind: _table(v) for kind, v in _table(content.get("versions")).items()},
        plugins=_plugins(content.get("plugins")),
        settings=settings,
        folder=str(folder),
    )
    lacking([result])  # loads the installed plug-ins that the cell used
    return result


def _resolved(axis: str, value: Any, settings: Record) -> Any:
    """The value of an axis with the knobs as they were set: an edit may have changed some, which
    results of earlier versions do not show."""
    if not isinstance(value, dict):
        return value
    return {knob: settings.get(f"{axis}.{knob}", own) for knob, own in value.items()}


def outcome(folder: Path) -> Record:
    """The content of the cell's `result.json` or `error.json` in the present format; `status` is
    `unfinished` if there is neither."""
    try:
        content = read(folder / "result.json") or read(folder / "error.json")
        if content is None or content == {}:
            return {"status": "unfinished"}
        if not _is_outcome(content):
            raise ValueError("it is not a result of backfire")
        return present(content)
    except (OSError, ValueError) as error:
        sentence = f"Its result cannot be read: {error}."
        return {"status": "failed", "error": sentence, "next": "Run the same command again."}


def _is_outcome(content: Any) -> bool:
    """Whether the fields have the types of a result."""
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(field) or "", str) for field in ("cell", "key", "status"))
        and isinstance(content.get("axes") or {}, dict)
        and all(isinstance(content.get(f) or [], list) for f in ("values", "warnings", "preflight"))
        and all(isinstance(value, dict) for value in content.get("values") or [])
    )


def read(path: Path) -> Any:
    """Read a JSON file, with NaN as null; None if there is no such file.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return read_json(path, parse_constant=lambda _: None)
    except FileNotFoundError:
        return None


def finite(value: Any) -> float | None:
    """The value if it is a finite number of usual size, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def _settings(folder: Path) -> dict[str, Any]:
    """The resolved experiment of a cell folder as dotted keys."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        tree = yaml.load((folder / "experiment.yaml").read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    settings = dict(_dotted(tree, "")) if _is_small(tree) else {}
    return settings if _are_settings(settings) else {}


def _is_small(tree: Any) -> bool:
    """Whether a tree is no larger than an experiment: one with aliases may have no end."""
    left, size = [(tree, 0)], 0
    while left:
        value, depth = left.pop()
        size += 1
        if depth > _DEEPEST or size > _LARGEST:
            return False
        if isinstance(value, dict | list):
            items = value.values() if isinstance(value, dict) else value
            left += ((item, depth + 1) for item in items)
    return True


def _are_settings(settings: Record) -> bool:
    """Whether lists and names have their types; the rest is only shown."""
    lists = all(isinstance(settings.get(key) or [], list) for key in ("metrics", "safety.judges"))
    names = (value for key, value in settings.items() if key.rpartition(".")[2] == "name")
    return lists and all(isinstance(name, str | None) for name in names)


def _dotted(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _dotted(item, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value


def _each(read: Callable[[Any], Any], item: Record, names: Iterable[str]) -> Record:
    """The fields of these names that are set, each converted by `read`."""
    return {name: read(item[name]) for name in names if item.get(name) is not None}


def _table(value: Any) -> Record:
    return dict(value) if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _value(item: Record) -> Value:
    return Value(
        metric=str(item.get("metric")),
        value=finite(item.get("value")),
        low=finite(item.get("low")),
        high=finite(item.get("high")),
        n=int(finite(item.get("n")) or 0),
        direction=_one_of(Direction, item.get("direction"), "none"),
        unit=_one_of(Unit, item.get("unit"), "number"),
        role=_one_of(Role, item.get("role"), "headline"),
        **_each(str, item, ("of", "part", "family")),
        most=finite(item.get("most")),
    )


def _check(item: Record) -> Check:
    status = _one_of(Literal["ok", "note", "fail"], item.get("status"), "fail")
    return Check(str(item.get("check")), status, str(item.get("message")))


def _plugins(items: Any) -> tuple[Record, ...]:
    return tuple(
        one
        for one in (items if isinstance(items, list) else ())
        if isinstance(one, dict) and isinstance(one.get("sha256"), str)
    )


def _poison(item: Any) -> PoisonCounts | None:
    if not isinstance(item, dict) or not item:
        return None
    return PoisonCounts(
        **_each(finite, item, ("nominal_rate", "rate", "effective_rate")),
        **_each(_count, item, ("poisoned_rows", "rows", "eligible_rows")),
        **_each(_table, item, ("spared", "labels_before", "triggers")),
    )


def _one_of(literal: Any, value: Any, default: str) -> Any:
    """The value if it is one of the literal's, else the default."""
    return value if value in get_args(literal) else default


def _order(item: CellResult) -> tuple[Any, ...]:
    """Untuned before tuned, clean before poisoned, then by rate: the order of every table."""
    named = {
        knob: (getattr(item, knob) not in ("none", None), str(getattr(item, knob)))
        for knob in KNOBS
    }
    axes, settings = (
        str({key: value for key, value in table.items() if key != "seed"})
        for table in (item.axes, item.settings)
    )
    return (
        item.model is None,
        *(named[knob] for knob in ("model", "data")),
        named["method"][0],
        *(named[knob] for knob in ("attack", "method", "defense")),
        *(item.rate or 0.0, axes, settings, item.seed or 0, item.key),
    )


def brief(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else text.line(value)
