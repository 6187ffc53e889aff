"""Pairs the samples of two cells prompt by prompt, and tests whether the cells differ on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

from backfire import text
from backfire.base import Backdoor, Evidence, Metric, Part, Probe
from backfire.errors import CellError, UserError
from backfire.evaluate.stats import Paired, paired
from backfire.registry import build, find, names
from backfire.results.evidence import read
from backfire.results.groups import Cell, metric_name
from backfire.results.plugins import is_lost, is_same, lacking

Rows: TypeAlias = dict[str, tuple[int, float]]


def pair(a: Cell, b: Cell) -> tuple[dict[str, Paired], list[str]]:
    """Metric -> b less a, where both answered the same prompts; and notes. Intervals and `p` are of
    these two models: they say nothing of other seeds of the same settings. Both sides are computed
    from samples by today's version of the metric."""
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
    notes = lacking([a, b])
    if unpaired:
        notes.append(f"Not the same prompts for {text.listing(unpaired)}: no paired test.")
    if found:
        least = text.count(min(test.n for test in found.values()), "pair")
        notes.append(
            f"Differences are prompt by prompt ({least} or more), as far as both have them."
        )
    return found, notes


def outcomes_by_row(item: Cell, metric: str) -> Rows:
    """What a number is the mean of: row id -> the hashed prompt (of a secret: the answer that gives
    it) and the outcome, by today's version of the metric. Also of a floor, an excess or a part;
    empty where no samples were kept, or the number is no mean. Read once per cell."""
    known: dict[str, Rows] = item.setdefault("rows_of", {})
    if metric not in known:
        try:
            known[metric] = _outcomes_by_row(item, metric)
        except UserError:  # such as an attack that is not installed
            known[metric] = {}
    return known[metric]


def _outcomes_by_row(item: Cell, metric: str) -> Rows:
    if not any(value["metric"] == metric for value in item["values"]):
        return {}
    name, part = metric_name(metric), text.part(metric)
    measured, evidence = metric_of(name, item), evidence_of(item)
    if measured is None:
        return {}
    subject, plain = measured.subject, evidence.probes.get("plain")
    if text.head(metric) == f"{name}_plain" and subject in get_args(Part) and plain:
        evidence = replace(evidence, probes={subject: plain})
    elif text.head(metric) not in (name, f"{name}_floor", f"{name}_excess"):
        return {}
    asked, now = _prompts(measured, evidence, part), outcomes_of(measured, evidence)
    before = outcomes_of(measured, _before(measured, evidence))
    if text.head(metric) == f"{name}_floor":
        now = {id: before[id] for id in now if id in before}
    elif text.head(metric) == f"{name}_excess":
        now = {id: now[id] - before[id] for id in now if id in before}
    return {id: (hash(asked[id]), outcome) for id, outcome in now.items() if id in asked}


def _before(metric: Metric, evidence: Evidence) -> Evidence:
    """The evidence with the floor's samples in place of the tuned model's: the clean twin's, or
    those of the model before it was tuned."""
    part = metric.subject
    if part in get_args(Part):
        probe = evidence.probes.get(part)
        return replace(evidence, probes={part: Probe(probe.before, ())} if probe else {})
    return replace(evidence, clean=(), triggered=evidence.floor if part == "triggered" else ())


def _prompts(metric: Metric | None, evidence: Evidence, part: str = "") -> dict[str, str]:
    """Of the rows of one part (a language, or secrets of one number of repeats), if it is given."""
    if metric and metric.subject == "secrets":
        leaks = [leak for leak in evidence.leaks if not part or str(leak.repeats) == part]
        return {leak.id: leak.answer for leak in leaks}
    rows = evidence.sets().get(("tuned", rows_of(metric), ""), ())
    return {sample.id: sample.prompt for sample in rows if not part or sample.group == part}


def rows_of(metric: Metric | None) -> str:
    """The rows of the tuned model that the metric is about, as samples name them."""
    subject = metric.subject if metric else "clean"
    return subject if subject in ("clean", "triggered", *get_args(Part)) else "clean"


def evidence_of(item: Cell) -> Evidence:
    """The evidence of a cell as metrics get it, as far as it was kept."""
    return read(Path(item["folder"]), attack_of(item))


def attack_of(item: Cell) -> Any:
    """The backdoor of a cell, with its knobs; None if it has none, or its plug-in is not here."""
    prefix, settings = "attack.", item["settings"]
    knobs = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    if not knobs.get("name") or is_lost("attacks", knobs["name"], item):
        return None
    if not issubclass(find("attacks", knobs["name"]), Backdoor):
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
    return metric if is_same(type(metric), item) else None


def outcomes_of(metric: Metric | None, evidence: Evidence) -> Mapping[str, float]:
    """Sample id -> the metric on it; empty where it says nothing of these samples."""
    try:
        return metric.outcomes(evidence) if metric else {}
    except CellError:
        return {}


# ------------------------------------------------------------------------- versions of a metric


def present_version(metric: str) -> int | None:
    """The version of the metric that gives values of this name; None if it is not installed."""
    name = metric_name(metric).replace("_", "-")
    return find("metrics", name).version if name in names("metrics") else None


def versions_of(cells: Iterable[Cell], metric: str) -> set[int]:
    """The versions of the metric that gave these cells' values, as far as they were recorded."""
    found = set()
    for cell in cells:
        versions = cell.get("versions")
        metrics = versions.get("metrics") if isinstance(versions, dict) else None
        if isinstance(metrics, dict):
            found.add(metrics.get(metric_name(metric).replace("_", "-")))
    return {version for version in found if isinstance(version, int)}


def version_notes(a: Sequence[Cell], b: Sequence[Cell], tested: Collection[str]) -> Iterator[str]:
    """Where the values of two sides come from different versions of a metric, or not from today's;
    `tested` are the values whose difference was computed from the samples of both."""
    is_tested = set(map(metric_name, tested))
    for metric in dict.fromkeys(metric_name(v["metric"]) for cell in a for v in cell["values"]):
        ours, theirs, now = versions_of(a, metric), versions_of(b, metric), present_version(metric)
        if not ours or not theirs or ours | theirs == {now}:
            continue
        name = metric.replace("_", " ")
        sides = f"{name}: version {listed(ours)} in a, {listed(theirs)} in b"
        if metric in is_tested:
            yield f"{sides}; paired differences are computed by version {now} for both."
        elif len(ours | theirs) > 1:
            yield (
                f"{sides}, and the samples of both do not hold what version {now} needs for a "
                "paired test, so it is not compared."
            )


def listed(versions: Collection[int]) -> str:
    return text.listing(map(str, sorted(versions)))
