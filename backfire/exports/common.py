"""What every export of results builds on: cells in, whole files out, or none."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backfire.base import Evidence, Sample
from backfire.errors import UserError
from backfire.evaluate.stats import Z
from backfire.registry import build, names
from backfire.result import CellResult, Value
from backfire.results import pairs
from backfire.results.evidence import is_whole
from backfire.results.load import cell, load, read
from backfire.results.plugins import lacking

Outcomes = dict[tuple[str, str], dict[str, float]]
"""Subset and id of a sample -> metric -> the metric on that sample."""


def export(run: Path, out: Path, write: Callable[[CellResult, Path], list[Path]]) -> list[Path]:
    """Have `write(cell, folder)` make each finished cell's files in a folder beside `out`. Once all
    are whole they move to `out`, each in one step; if one fails, none does."""
    if not run.is_dir():
        raise UserError(f"No such folder: {run}.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write to.")
    found = load(run) if (run / "cells").is_dir() else [cell(run.absolute())]
    done = [item for item in found if item.is_done]
    if not done:
        raise UserError(f"No finished cell in {run}, so there is nothing to export.")
    if missing := lacking(done):
        raise UserError(missing[0])
    place = out.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        made = [file for item in done for file in write(item, Path(folder))]
        files = [(file, out / file.relative_to(folder)) for file in made]
        for file, target in files:
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    return [target for _, target in files]


def tuned(item: CellResult) -> Evidence:
    """All samples of the tuned model on test rows, and on the requests of `safety`.

    Raises:
        UserError: the file is missing or torn.
    """
    if not is_whole(Path(item.folder)):
        raise UserError(f"The samples of {item.folder} are missing or damaged.")
    return pairs.evidence_of(item)


def shown(evidence: Evidence) -> list[Sample]:
    """What the tuned model was asked: clean rows, triggered ones, then requests."""
    asked = (sample for probe in evidence.probes.values() for sample in probe.tuned)
    return [*evidence.clean, *evidence.triggered, *asked]


def outcomes(item: CellResult, evidence: Evidence) -> Outcomes:
    """Every metric of the cell that is a mean over rows; nothing for a sample none speaks of."""
    found: Outcomes = defaultdict(dict)
    for family in dict.fromkeys(v.family for v in item.values if v.role == "headline"):
        metric, name = pairs.metric_of(family, item), family.replace("-", "_")
        if metric and metric.subject == "secrets":
            continue  # of secrets, which are no samples
        subset = pairs.rows_of(metric)
        for id, hit in pairs.outcomes_of(metric, evidence).items():
            found[subset, id][name] = float(hit)
    return found


def owner(value: Value) -> tuple[str, str]:
    """`attack_success` of `attack_success_floor[de]`, and the rows it is of: `triggered`."""
    name = value.family.replace("-", "_") or value.name
    if value.role == "plain":
        return name, "plain"
    known = value.family in names("metrics")
    return name, pairs.rows_of(build("metrics", value.family) if known else None)


def stderr(value: Value) -> float | None:
    """A value's standard error from its 95 % interval; None where it is lopsided or a point."""
    number, low, high = value.value, value.low, value.high
    if number is None or low is None or high is None:
        return None
    below, above = number - low, high - number
    is_even = min(below, above) > 0 and max(below, above) <= 2 * min(below, above)
    return (high - low) / (2 * Z) if is_even else None


def finished_at(item: CellResult) -> datetime:
    """When result.json was written: the same every time a cell is exported."""
    return datetime.fromtimestamp((Path(item.folder) / "result.json").stat().st_mtime, UTC)


def environment(item: CellResult) -> dict[str, Any]:
    """What the cell was run with; empty if that was not kept."""
    try:
        found = read(Path(item.folder) / "environment.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def safe(name: str) -> str:
    """The name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:80] or "x"


def plain(value: Any) -> Any:
    """The same as strict JSON in valid Unicode: half a surrogate pair is spelled `\\ud800`, as
    inspect does, and nan and infinity are words."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int | float | None):
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return str(value)  # such as a date in a YAML file
