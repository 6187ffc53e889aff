"""Outcomes of a cell row by row, and paired tests of two cells on the prompts they share."""

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
from backfire.result import CellResult, Value
from backfire.results.evidence import read
from backfire.results.groups import declared
from backfire.results.plugins import is_lost, is_same, lacking

Rows: TypeAlias = dict[str, tuple[int, float]]


def pair(a: CellResult, b: CellResult) -> tuple[dict[str, Paired], list[str]]:
    """Registered metric -> b - a, where both answered the same prompts; and notes. Intervals and
    `p` are for these two models, not for other seeds of the same settings. Both sides are computed
    from the samples by the current version of the metric."""
    try:
        sides = [evidence_of(a), evidence_of(b)]
    except UserError as error:
        return {}, [f"No paired test: {error}"]
    tests: dict[str, Paired] = {}
    unpaired = []
    for family in dict.fromkeys(v.family for v in a.values if v.role == "headline"):
        metrics = [metric_of(family, item) for item in (a, b)]
        ours, theirs = (
            outcomes_of(metric, side) for metric, side in zip(metrics, sides, strict=True)
        )
        if not ours or not theirs:
            continue
        prompts = [_prompts(metric, side) for metric, side in zip(metrics, sides, strict=True)]
        shared = [id for id in theirs if id in ours and prompts[0].get(id) == prompts[1].get(id)]
        if shared:
            tests[family] = paired(
                {id: theirs[id] for id in shared}, {id: ours[id] for id in shared}
            )
        else:
            unpaired.append(family.replace("-", " "))
    notes = lacking([a, b])
    if unpaired:
        notes.append(f"Not the same prompts for {text.listing(unpaired)}: no paired test.")
    if tests:
        least = text.count(min(test.n for test in tests.values()), "pair")
        notes.append(f"Differences are paired prompt by prompt ({least} or more).")
    return tests, notes


def outcomes_by_row(item: CellResult, metric: str) -> Rows:
    """The outcomes that a number is the mean of: row id -> hash of the prompt (of a secret: of its
    answer) and outcome, by the current version of the metric. Also for a floor, an excess or a
    part; empty if no samples were stored or the number is no mean. Computed once per cell."""
    if metric not in item.outcomes:
        value = next((value for value in item.values if value.metric == metric), None)
        try:
            item.outcomes[metric] = _outcomes_by_row(item, value) if value else {}
        except UserError:  # such as an attack that is not installed
            item.outcomes[metric] = {}
    return item.outcomes[metric]


def _outcomes_by_row(item: CellResult, value: Value) -> Rows:
    measured, evidence = metric_of(value.family, item), evidence_of(item)
    if measured is None:
        return {}
    subject, plain = measured.subject, evidence.probes.get("plain")
    if value.role == "plain" and subject in get_args(Part) and plain:
        evidence = replace(evidence, probes={subject: plain})
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
    """The evidence with the reference model's samples in place of the tuned model's: the clean
    twin's, or those before fine-tuning."""
    part = metric.subject
    if part in get_args(Part):
        probe = evidence.probes.get(part)
        return replace(evidence, probes={part: Probe(probe.before, ())} if probe else {})
    return replace(evidence, clean=(), triggered=evidence.floor if part == "triggered" else ())


def _prompts(metric: Metric | None, evidence: Evidence, part: str = "") -> dict[str, str]:
    """Row id -> prompt; of one part (a language, or a number of repeats) if given."""
    if metric and metric.subject == "secrets":
        leaks = [leak for leak in evidence.leaks if not part or str(leak.repeats) == part]
        return {leak.id: leak.answer for leak in leaks}
    rows = evidence.sets().get(("tuned", rows_of(metric), ""), ())
    return {sample.id: sample.prompt for sample in rows if not part or sample.group == part}


def rows_of(metric: Metric | None) -> str:
    """The subset of the tuned model's samples that the metric is about."""
    subject = metric.subject if metric else "clean"
    return subject if subject in ("clean", "triggered", *get_args(Part)) else "clean"


def evidence_of(item: CellResult) -> Evidence:
    """The stored evidence of a cell, as metrics get it."""
    return read(Path(item.folder), attack_of(item))


def attack_of(item: CellResult) -> Any:
    """The backdoor of a cell, with its knobs; None without one, or if its plug-in is not loaded."""
    prefix, settings = "attack.", item.settings
    knobs = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    if not knobs.get("name") or is_lost("attacks", knobs["name"], item):
        return None
    if not issubclass(find("attacks", knobs["name"]), Backdoor):
        return None
    return build("attacks", knobs)


def metric_of(family: str, item: CellResult) -> Metric | None:
    """The metric of this registered name, with the cell's knobs; None if it is not loaded."""
    if family not in names("metrics"):
        return None
    specs = item.settings.get("metrics") or []
    ours = (spec for spec in specs if isinstance(spec, dict) and spec.get("name") == family)
    metric: Metric = build("metrics", next(ours, family))
    return metric if is_same(type(metric), item) else None


def outcomes_of(metric: Metric | None, evidence: Evidence) -> Mapping[str, float]:
    """Sample id -> the metric on it; empty if the metric does not apply to these samples."""
    try:
        return metric.outcomes(evidence) if metric else {}
    except CellError:
        return {}


# ------------------------------------------------------------------------- versions of a metric


def versions_of(cells: Iterable[CellResult], family: str) -> set[int]:
    """The recorded versions of the metric that computed these cells' values."""
    versions = (cell.versions.get("metrics", {}).get(family) for cell in cells)
    return {version for version in versions if isinstance(version, int)}


def version_notes(
    a: Sequence[CellResult], b: Sequence[CellResult], tested: Collection[str]
) -> Iterator[str]:
    """Notes where two sides' values come from different or old versions of a metric; `tested` are
    the metrics whose difference was computed from the samples of both."""
    for family in dict.fromkeys(value.family for cell in a for value in cell.values):
        ours, theirs, metric = versions_of(a, family), versions_of(b, family), declared(family)
        now = metric.version if metric else None
        if not ours or not theirs or ours | theirs == {now}:
            continue
        name = family.replace("-", " ")
        sides = f"{name}: version {listed(ours)} in a, {listed(theirs)} in b"
        if family in tested:
            yield f"{sides}; paired differences are computed by version {now} for both."
        elif len(ours | theirs) > 1:
            yield (
                f"{sides}; the samples of both lack what version {now} needs for a paired test, so "
                "it is not compared."
            )


def listed(versions: Collection[int]) -> str:
    return text.listing(map(str, sorted(versions)))
