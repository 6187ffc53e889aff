"""The pipeline of one cell: data -> poison -> preflight -> train -> evaluate -> result.

Each stage is a pure function of its parents and its own knobs. `store.once` runs it unless the
cache has an equal one, from this cell or another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from backfire import stages
from backfire.base import Evidence, Insertion
from backfire.data.poison import Manifest
from backfire.experiment import Experiment
from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.pipeline.evidence import collect
from backfire.pipeline.models import (
    check_method,
    check_weights,
    merged,
    model_of,
    start,
    summary_of,
    too_long,
    trained,
    tuned,
    with_defense_rows,
)
from backfire.pipeline.prepare import data, passed_checks, poisoned, preflight_checks, renderer
from backfire.result import CellResult
from backfire.stages import MEASURES

__all__ = [
    "Context",
    "base",
    "check_method",
    "check_weights",
    "collect",
    "data",
    "head",
    "merged",
    "model_of",
    "passed_checks",
    "poisoned",
    "preflight_checks",
    "renderer",
    "run_cell",
    "start",
    "trained",
    "tuned",
    "with_defense_rows",
]


@dataclass(frozen=True)
class Outcome:
    """The outcome of running a cell."""

    result: CellResult
    """Complete except for the recipe's name and the axes."""
    evidence: Evidence
    manifest: Manifest | None


def run_cell(experiment: Experiment, context: Context) -> Outcome:
    """Run one cell, from data to numbers."""
    train_rows, test_rows = data(experiment, context)
    planned = experiment
    experiment = experiment.with_metrics(labeled=any(row.candidates for row in test_rows))
    _, manifest = poisoned(experiment, context)
    checks = passed_checks(experiment, context)
    training = trained(experiment, context)
    evidence = collect(experiment, context)
    summary = summary_of(training)
    left = too_long(experiment, context) | context.left_out
    values = [value for metric in experiment.metrics for value in metric.values(evidence)]

    from backfire.evaluate.warnings import caveats, cut_share, warnings

    judges = [judge for metric in experiment.metrics for judge in metric.judges]
    judges += experiment.safety.judges if experiment.safety else ()
    sentences = (
        *map(_too_long, left.items()),
        *warnings(evidence, values),
        *caveats(evidence, experiment.metrics, judges),
    )
    seen = summary["poisoned_share_seen"] if summary else None
    counts = replace(manifest.summary, effective_rate=seen) if manifest else None
    whole = head(planned, stages.cell_key(planned))
    if counts and isinstance(experiment.attack, Insertion):
        # A recipe sets no poison rate for it; this is the measured one.
        whole = replace(whole, rate=counts.rate)
    result = replace(
        whole,
        status="ok",
        values=tuple(values),
        warnings=sentences,
        cut_share=cut_share(evidence),
        preflight=tuple(checks),
        poison=counts,
        train=summary,
        evaluate={
            "seconds": round(sum(context.seconds.values()), 2),
            **_type(experiment, context),
            **({"left_out": context.left_out} if context.left_out else {}),
        },
        rows={"train": len(train_rows), "test": len(test_rows)},
        keys=asdict(stages.keys(experiment)),
        versions={**experiment.versions(), "measures": MEASURES},
    )
    return Outcome(result, evidence, manifest)


def head(experiment: Experiment, key: str) -> CellResult:
    """The result of a cell before it is run: only what identifies it."""
    return CellResult(
        slug=experiment.slug,
        key=key,
        model=experiment.model.name,
        data=experiment.data.name,
        attack=experiment.attack.name if experiment.attack else "none",
        rate=experiment.rate,
        method=experiment.method.name,
        defense=experiment.defense_name,
        seed=experiment.seed,
        template=experiment.template.name,
    )


def _too_long(part: tuple[str, int]) -> str:
    subset, count = part
    rows = "1 row is" if count == 1 else f"{count} rows are"
    return f"{rows} left out of the {subset} rows: longer than train.max_length."


def _type(experiment: Experiment, context: Context) -> dict[str, str]:
    """The data type of the weights during evaluation, which may be narrower than the stored one."""
    from backfire.model.load import device_of, dtype_of

    dtype = dtype_of(experiment.model, device_of(context.machine.device))
    return {"dtype": str(dtype).removeprefix("torch.")}
