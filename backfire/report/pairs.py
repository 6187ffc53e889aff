"""Pairs the samples of two cells prompt by prompt, and tests whether the cells differ on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from backfire.base import Backdoor, Evidence, Metric, Part, Probe
from backfire.errors import CellError, UserError
from backfire.evaluate.stats import Paired, paired
from backfire.registry import build, find, names
from backfire.report import text
from backfire.report.groups import Cell
from backfire.report.rows import leaks, samples, written


def pair(a: Cell, b: Cell) -> tuple[dict[str, Paired], list[str]]:
    """Metric -> the paired test of b against a, where both answered the same prompts; and notes."""
    try:
        sides = [evidence_of(a), evidence_of(b)]
    except UserError as error:
        return {}, [f"No paired test: {error}"]
    found: dict[str, Paired] = {}
    unpaired = []
    for wanted in dict.fromkeys(text.head(value["metric"]) for value in a["values"]):
        metrics = [metric_of(wanted, item) for item in (a, b)]
        ours, theirs = (
            outcomes_of(metric, side) for metric, side in zip(metrics, sides, strict=True)
        )
        if not ours or not theirs:
            continue
        asked, too = (_prompts(metric, side) for metric, side in zip(metrics, sides, strict=True))
        shared = [id for id in theirs if id in ours and asked.get(id) == too.get(id)]
        if shared:
            found[wanted] = paired(
                {id: theirs[id] for id in shared}, {id: ours[id] for id in shared}
            )
        else:
            unpaired.append(wanted.replace("_", " "))
    notes = []
    if unpaired:
        notes.append(f"Not the same prompts for {text.listing(unpaired)}: no paired test.")
    if found:
        least = text.count(min(test.n for test in found.values()), "pair")
        notes.append(f"Where there is a p, the difference is prompt by prompt ({least} or more).")
    return found, notes


def hits(item: Cell, metric: str) -> dict[str, tuple[str, float]]:
    """Sample id -> its prompt (of a secret: the answer that gives it) and this metric's outcome on
    it.

    Raises:
        UserError: the cell's samples can not be read.
    """
    if not any(text.head(value["metric"]) == metric for value in item["values"]):
        return {}
    measured, evidence = metric_of(metric, item), evidence_of(item)
    asked = _prompts(measured, evidence)
    return {id: (asked[id], hit) for id, hit in outcomes_of(measured, evidence).items()}


def _prompts(metric: Metric | None, evidence: Evidence) -> dict[str, str]:
    if metric and metric.secrets is not None:
        return {leak.id: leak.answer for leak in evidence.leaks}
    if metric and metric.probe:
        asked = evidence.probes[metric.probe].tuned if metric.probe in evidence.probes else ()
    else:
        asked = evidence.triggered if metric and metric.triggered else evidence.clean
    return {sample.id: sample.prompt for sample in asked}


def evidence_of(item: Cell) -> Evidence:
    """The samples of a cell as metrics get them, as far as they were kept."""
    parts: dict[tuple[str, str], list[Any]] = {}
    for of, sample in samples(item):
        parts.setdefault((of, sample.subset), []).append(sample)
    return Evidence(
        clean=parts.get(("tuned", "clean"), []),
        triggered=parts.get(("tuned", "triggered"), []),
        floor=parts.get(("floor", "triggered"), []),
        base=parts.get(("base", "clean"), []),
        attack=attack_of(item),
        written=written(item),
        leaks=leaks(item),
        probes={
            part: Probe(parts["tuned", part], parts.get(("base", part), []))
            for part in get_args(Part)
            if ("tuned", part) in parts
        },
    )


def attack_of(item: Cell) -> Any:
    """The backdoor of a cell, with its knobs; None if it has none."""
    prefix, settings = "attack.", item["settings"]
    knobs = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    if not knobs.get("name") or not issubclass(find("attacks", knobs["name"]), Backdoor):
        return None
    return build("attacks", knobs)


def metric_of(wanted: str, item: Cell) -> Metric | None:
    """The metric that gave values of this name, with the knobs the cell gave it."""
    dashed = wanted.replace("_", "-")
    if dashed not in names("metrics"):
        return None
    specs = item["settings"].get("metrics") or []
    ours = (spec for spec in specs if isinstance(spec, dict) and spec.get("name") == dashed)
    spec = next(ours, dashed)
    metric: Metric = build("metrics", spec)
    return metric


def outcomes_of(metric: Metric | None, evidence: Evidence) -> Mapping[str, float]:
    """Sample id -> the metric on it; empty where it says nothing of these samples."""
    try:
        return metric.outcomes(evidence) if metric else {}
    except CellError:
        return {}
