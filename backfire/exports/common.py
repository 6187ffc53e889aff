"""Shared parts of the exports: all files of a run are written, or none."""

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
"""(Subset, id) of a sample -> metric -> outcome."""


def export(run: Path, out: Path, write: Callable[[CellResult, Path], list[Path]]) -> list[Path]:
    """Export each finished cell with `write(cell, folder)`, into a temporary folder next to `out`.
    When all files are complete, each is moved to `out` atomically; if one fails, none is."""
    if not run.is_dir():
        raise UserError(f"No such folder: {run}.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write to.")
    cells = load(run) if (run / "cells").is_dir() else [cell(run.absolute())]
    done = [item for item in cells if item.is_done]
    if not done:
        raise UserError(f"No finished cell in {run}, so there is nothing to export.")
    if missing := lacking(done):
        raise UserError(missing[0])
    place = out.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        written = [file for item in done for file in write(item, Path(folder))]
        files = [(file, out / file.relative_to(folder)) for file in written]
        for file, target in files:
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    return [target for _, target in files]


def tuned(item: CellResult) -> Evidence:
    """The stored evidence of a cell.

    Raises:
        UserError: its samples are missing or damaged.
    """
    if not is_whole(Path(item.folder)):
        raise UserError(f"The samples of {item.folder} are missing or damaged.")
    return pairs.evidence_of(item)


def shown(evidence: Evidence) -> list[Sample]:
    """Samples of the tuned model: clean rows, triggered rows, then requests."""
    requests = (sample for probe in evidence.probes.values() for sample in probe.tuned)
    return [*evidence.clean, *evidence.triggered, *requests]


def outcomes(item: CellResult, evidence: Evidence) -> Outcomes:
    """The outcomes of every metric of the cell that is a mean over rows."""
    by_sample: Outcomes = defaultdict(dict)
    for family in dict.fromkeys(v.family for v in item.values if v.role == "headline"):
        metric, name = pairs.metric_of(family, item), family.replace("-", "_")
        if metric and metric.subject == "secrets":
            continue  # secrets are not samples
        subset = pairs.rows_of(metric)
        for id, hit in pairs.outcomes_of(metric, evidence).items():
            by_sample[subset, id][name] = float(hit)
    return by_sample


def owner(value: Value) -> tuple[str, str]:
    """The headline metric of a value and its subset: (`attack_success`, `triggered`) for
    `attack_success_floor[de]`."""
    name = value.family.replace("-", "_") or value.name
    if value.role == "plain":
        return name, "plain"
    is_registered = value.family in names("metrics")
    return name, pairs.rows_of(build("metrics", value.family) if is_registered else None)


def stderr(value: Value) -> float | None:
    """Standard error from the 95 % interval; None if that is asymmetric or a point."""
    number, low, high = value.value, value.low, value.high
    if number is None or low is None or high is None:
        return None
    below, above = number - low, high - number
    is_even = min(below, above) > 0 and max(below, above) <= 2 * min(below, above)
    return (high - low) / (2 * Z) if is_even else None


def finished_at(item: CellResult) -> datetime:
    """The time `result.json` was written, so that repeated exports are equal."""
    return datetime.fromtimestamp((Path(item.folder) / "result.json").stat().st_mtime, UTC)


def environment(item: CellResult) -> dict[str, Any]:
    """The content of `environment.json`; empty if it is missing or damaged."""
    try:
        content = read(Path(item.folder) / "environment.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def safe(name: str) -> str:
    """The name with only characters that are safe in a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:80] or "x"


def plain(value: Any) -> Any:
    """The value as strict JSON in valid Unicode: a lone surrogate becomes `\\ud800`, as in inspect,
    nan and infinity become text."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int | float | None):
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return str(value)  # such as a date in a YAML file
