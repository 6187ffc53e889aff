"""`backfire results`, and its `--rescore`: metrics on kept samples, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from backfire import text
from backfire.base import Ask, Evidence, Leak, Metric, Need, Sample
from backfire.base.normalize import normalized
from backfire.commands.failure import note
from backfire.commands.options import echo
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment
from backfire.launch.job import read_cell
from backfire.registry import build
from backfire.result import CellResult, Value
from backfire.results.evidence import is_whole, read
from backfire.results.groups import group
from backfire.results.load import MEANS, Record, finite, load, records_of, titles, write
from backfire.results.load import over_seeds as means
from backfire.results.terminal import print_groups, print_records
from backfire.yaml12 import read_yaml

MODELS: Final = {
    **{"tuned": "the tuned model", "base": "the model before fine-tuning"},
    "twin": "the clean twin",
}
ROWS: Final = {
    **{"clean": "clean test rows", "triggered": "triggered test rows"},
    **{"harmful": "harmful requests", "allowed": "requests that only look harmful"},
    **{"plain": "plain harmful requests", "members": "training rows"},
}
NEEDS: Final[Mapping[Need, str]] = {
    **{"scores": "the candidates' likelihoods", "replies": "the replies"},
    **{"answers": "the answers' likelihoods", "probe": "the hidden states"},
}


def print_results(
    run: Path, form: Literal["table", "json", "csv"], specs: Sequence[str], *, over_seeds: bool
) -> None:
    """Print the numbers of a run by cell, or their means over seeds."""
    cells = load(run)
    if over_seeds:
        if specs:
            raise UserError("--over-seeds and --rescore cannot be combined.")
        groups = group(cells)
        if form == "table":
            print_groups(groups)
        else:
            echo(write(means(groups), form, MEANS).rstrip("\n"))
        return
    rows = rescored(run, specs) if specs else records_of(cells)
    if form == "table":
        named = zip((cell.key for cell in cells), titles(cells), strict=True)
        print_records(rows, titles=dict(named))
    else:
        echo(write(rows, form).rstrip("\n"))


def rescored(run: Path, specs: Sequence[str]) -> list[Record]:
    """Compute the metrics of `specs` on the samples of every finished cell, without writing files.

    Each spec is a YAML value: a name, {name, ...knobs} or a list of these. A note on stderr says
    for which cells a metric cannot be computed.

    Raises:
        UserError: a metric has no number in any cell.
    """
    metrics, cells = _metrics(specs), load(run)
    done = sum(item.is_done for item in cells)
    if not done:
        raise UserError(f"No finished cell in {run}, so there are no samples to compute from.")
    lacking: dict[str, list[str]] = {metric.name: [] for metric in metrics}
    found = [
        replace(item, values=tuple(_values(metrics, item, lacking)) if item.is_done else ())
        for item in cells
    ]
    computed = {value.family for item in found for value in item.values}
    for name, reasons in lacking.items():
        if name not in computed and not reasons:
            raise UserError(f"{name} applies to no cell of {run}.")
        if name not in computed:
            raise UserError(
                f"{name} cannot be computed for {reasons[0]}. Run the recipe with this metric "
                "added; stages that are cached are not run again."
            )
        if reasons:
            some = f"{len(reasons)} of {text.count(done, 'cell')}"
            note(f"{name} cannot be computed for {some}, such as {reasons[0]}.")
    return records_of(item for item in found if item.values)


def _metrics(specs: Sequence[str]) -> list[Metric]:
    parsed = [read_yaml(spec, "--rescore") for spec in specs]
    metrics: dict[str, Metric] = {}
    for part in (part for one in parsed for part in (one if isinstance(one, list) else [one])):
        metric: Metric = build("metrics", part if isinstance(part, Mapping) else str(part))
        if metric.name in metrics:
            raise UserError(f"--rescore: metric '{metric.name}' is given twice.")
        metrics[metric.name] = metric
    return list(metrics.values())


def _values(
    metrics: Sequence[Metric], item: CellResult, lacking: Mapping[str, list[str]]
) -> Iterator[Value]:
    """The numbers of a cell; `lacking` gets the reason for each metric that has none."""
    for metric in metrics:
        try:
            values = _measured(metric, item)
        except (CellError, UserError) as error:
            lacking[metric.name].append(f"cell {item.slug}: {str(error).rstrip('.')}")
            continue
        for value in values:
            ends = (finite(value.value), finite(value.low), finite(value.high))
            yield replace(value, value=ends[0], low=ends[1], high=ends[2])


def _measured(metric: Metric, item: CellResult) -> list[Value]:
    """The numbers of one metric, or an error that says why there are none."""
    folder = Path(item.folder)
    if not is_whole(folder):
        raise UserError("its samples are missing or damaged")
    experiment = read_cell(folder)
    evidence = read(folder, experiment.backdoor)
    if missing := _missing(metric, evidence, experiment, item):
        raise UserError(missing)
    return metric.values(evidence)


# --------------------------------------------------------------------------------- what is missing


def _missing(metric: Metric, evidence: Evidence, experiment: Experiment, item: CellResult) -> str:
    """What the metric needs and the cell did not keep; empty if it has everything."""
    labeled = any(row.candidates and row.num_better is None for row in evidence.clean)
    kept = [ask for own in experiment.metrics for ask in own.asks(labeled=labeled)]
    for ask in metric.asks(labeled=labeled):
        if not ask.applies(experiment.attack, experiment.method):
            continue
        if ask.rows == "training":
            is_kept = evidence.training or not experiment.method.trains
            missing = "" if is_kept else "the summary of its training run is not kept"
        elif ask.rows == "secrets":
            leaks = evidence.leaks_before if ask.of == "base" else evidence.leaks
            missing = _missing_secrets(ask, leaks, kept)
        else:
            missing = _missing_samples(ask, evidence, kept, item)
        if missing:
            return missing
    return ""


def _missing_samples(ask: Ask, evidence: Evidence, kept: Sequence[Ask], item: CellResult) -> str:
    rows = f"texts of {ask.texts.name}" if ask.texts else ROWS.get(ask.rows, ask.rows)
    where = f"of {MODELS.get(ask.of, f'the model {ask.of}')} on {rows}"
    samples = evidence[ask]
    if not samples:
        return f"samples {where} are not kept"
    if ask.rows == "triggered" and ask.target_rows and _without_target(evidence, samples):
        return f"samples {where} whose label is the target are not kept"
    for need in sorted(ask.needs):
        if any(not _has(need, sample) for sample in samples):
            return f"{NEEDS[need]} {where} are not kept"
    if ask.judged and not all(sample.verdicts for sample in samples):
        return f"judges' verdicts on the replies {where} are not kept"
    judges = [judge.identity() for one in kept if one.name == ask.name for judge in one.judges]
    for judge in ask.judges:
        is_judged = all(judge.name in sample.verdicts for sample in samples)
        is_same = judge.identity() in judges and _version(item, judge.name) in (None, judge.version)
        if not is_judged or not is_same:
            return f"verdicts of this judge ({judge.name}) on the replies {where} are not kept"
    return ""


def _without_target(evidence: Evidence, samples: Sequence[Sample]) -> bool:
    """Whether these are without the rows whose true label is the target."""
    wanted = normalized(evidence.attack.target) if evidence.attack else ""
    lost = {s.id for s in evidence.clean if s.label is not None and normalized(s.label) == wanted}
    return bool(lost) and lost.isdisjoint(sample.id for sample in samples)


def _has(need: Need, sample: Sample) -> bool:
    if need == "scores":
        return sample.logprobs is not None or not sample.candidates
    if need == "replies":
        return sample.reply is not None
    if need == "probe":
        return sample.probe is not None
    return sample.answer_logprob is not None or not sample.answer


def _missing_secrets(ask: Ask, leaks: Sequence[Leak], kept: Sequence[Ask]) -> str:
    """What is missing for the metric's secrets. They are scored with the largest number of codes
    and beams that a metric of the recipe asks for."""
    if not leaks:
        return "scores of the attack's secrets are not kept"
    for kind, amount in ask.secrets.items():
        most = max((one.secrets.get(kind, 0) for one in kept), default=0)
        is_ranked = kind == "exact" and all(leak.num_codes > amount or leak.rank for leak in leaks)
        if amount > most and not is_ranked:
            return f"its secrets were scored with {kind}: {most}, and {amount} is needed"
    return ""


def _version(item: CellResult, judge: str) -> int | None:
    """The version of a judge whose verdicts are kept; None where it was not recorded."""
    return item.versions.get("judges", {}).get(judge)
