"""Pairs the samples of two cells prompt by prompt, and tests whether the cells differ on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, get_args

from backfire import text
from backfire.base import Backdoor, Evidence, Leak, Metric, Part, Probe, Sample
from backfire.errors import CellError, UserError
from backfire.evaluate.stats import Paired, paired
from backfire.registry import build, find, names
from backfire.result import CellResult, Value
from backfire.results.samples import leaks, samples, written

Rows: TypeAlias = dict[str, tuple[int, float]]


def pair(a: CellResult, b: CellResult) -> tuple[dict[str, Paired], list[str]]:
    """Registered metric -> b less a, where both answered the same prompts; and notes. All of it is
    of these two models alone: `p` too says nothing of other seeds of the same settings."""
    try:
        sides = [evidence_of(a), evidence_of(b)]
    except UserError as error:
        return {}, [f"No paired test: {error}"]
    found: dict[str, Paired] = {}
    unpaired = []
    for wanted in dict.fromkeys(v.family for v in a.values if v.role == "headline"):
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
            unpaired.append(wanted.replace("-", " "))
    notes = []
    if unpaired:
        notes.append(f"Not the same prompts for {text.listing(unpaired)}: no paired test.")
    if found:
        least = text.count(min(test.n for test in found.values()), "pair")
        notes.append(
            f"Differences are prompt by prompt ({least} or more), as far as both have them."
        )
    return found, notes


def outcomes_by_row(item: CellResult, metric: str) -> Rows:
    """What a number is the mean of: row id -> what was asked there (of a secret: the answer that
    gives it), hashed, and the outcome. Also of a floor, an excess or a part; empty where nothing of
    that was kept, or the number is no mean. Read once a cell."""
    if metric not in item.outcomes:
        value = next((value for value in item.values if value.metric == metric), None)
        try:
            item.outcomes[metric] = _outcomes_by_row(item, value) if value else {}
        except UserError:  # such as an attack that nobody knows any more
            item.outcomes[metric] = {}
    return item.outcomes[metric]


def _outcomes_by_row(item: CellResult, value: Value) -> Rows:
    measured, evidence = metric_of(value.family, item), evidence_of(item)
    if measured is None:
        return {}
    if value.role == "plain" and measured.probe and "plain" in evidence.probes:
        evidence = replace(evidence, probes={measured.probe: evidence.probes["plain"]})
    elif value.role not in ("headline", "floor", "excess"):
        return {}
    asked, now = _prompts(measured, evidence, value.part), outcomes_of(measured, evidence)
    before = outcomes_of(measured, _before(measured, evidence))
    if value.role == "floor":
        now = {id: before[id] for id in now if id in before}
    elif value.role == "excess":
        now = {id: now[id] - before[id] for id in now if id in before}
    return {id: (hash(asked[id]), outcome) for id, outcome in now.items() if id in asked}


def _before(metric: Metric, evidence: Evidence) -> Evidence:
    """What the floor is measured on, where the tuned model's samples were: the clean twin's, or
    those of the model before it was tuned."""
    if metric.probe:
        probe = evidence.probes.get(metric.probe)
        return replace(evidence, probes={metric.probe: Probe(probe.before, ())} if probe else {})
    return replace(evidence, clean=(), triggered=evidence.floor if metric.triggered else ())


def _prompts(metric: Metric | None, evidence: Evidence, part: str = "") -> dict[str, str]:
    """Of the rows of one part (a language, or secrets of one number of repeats), if it is given."""
    if metric and metric.secrets is not None:
        known = [leak for leak in evidence.leaks if not part or str(leak.repeats) == part]
        return {leak.id: leak.answer for leak in known}
    if metric and metric.probe:
        asked = evidence.probes[metric.probe].tuned if metric.probe in evidence.probes else ()
    else:
        asked = evidence.triggered if metric and metric.triggered else evidence.clean
    return {sample.id: sample.prompt for sample in asked if not part or sample.group == part}


def evidence_of(item: CellResult) -> Evidence:
    """The samples of a cell as metrics get them, as far as they were kept."""
    folder = Path(item.folder)
    files = (folder / "samples.jsonl.gz", folder / "secrets.json")
    stamp = tuple((s.st_mtime_ns, s.st_size) for f in files if f.exists() for s in [f.stat()])
    parts, told = _kept(str(folder), stamp)
    return Evidence(
        clean=parts.get(("tuned", "clean"), []),
        triggered=parts.get(("tuned", "triggered"), []),
        floor=parts.get(("floor", "triggered"), []),
        base=parts.get(("base", "clean"), []),
        attack=attack_of(item),
        written=written(item.folder),
        leaks=told,
        probes={
            part: Probe(parts["tuned", part], parts.get(("base", part), []))
            for part in get_args(Part)
            if ("tuned", part) in parts
        },
    )


@lru_cache(maxsize=12)
def _kept(folder: str, stamp: object) -> tuple[dict[tuple[str, str], list[Sample]], list[Leak]]:
    """Samples by whose they are and of what, and secrets. A group's cells are read once for all of
    its numbers; `stamp` tells a changed file from the one read before."""
    parts: dict[tuple[str, str], list[Sample]] = {}
    for of, sample in samples(folder):
        parts.setdefault((of, sample.subset), []).append(sample)
    return parts, leaks(folder)


def attack_of(item: CellResult) -> Any:
    """The backdoor of a cell, with its knobs; None if it has none."""
    prefix, settings = "attack.", item.settings
    knobs = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    if not knobs.get("name") or not issubclass(find("attacks", knobs["name"]), Backdoor):
        return None
    return build("attacks", knobs)


def metric_of(family: str, item: CellResult) -> Metric | None:
    """The metric of this registered name, with the knobs the cell gave it."""
    if family not in names("metrics"):
        return None
    specs = item.settings.get("metrics") or []
    ours = (spec for spec in specs if isinstance(spec, dict) and spec.get("name") == family)
    metric: Metric = build("metrics", next(ours, family))
    return metric


def outcomes_of(metric: Metric | None, evidence: Evidence) -> Mapping[str, float]:
    """Sample id -> the metric on it; empty where it says nothing of these samples."""
    try:
        return metric.outcomes(evidence) if metric else {}
    except CellError:
        return {}
