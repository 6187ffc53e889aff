"""The pipeline of one cell: data -> poison -> preflight -> train -> evaluate -> result.

Each stage is a pure function of its parents and its own knobs. `store.once` runs it if no equal
stage was run before, by this cell or any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from backfire import stages
from backfire.base import Evidence, Insertion
from backfire.data.poison import Manifest
from backfire.experiment import Experiment
from backfire.pipeline.base_model import base, notes
from backfire.pipeline.context import Context
from backfire.pipeline.evidence import collect
from backfire.pipeline.models import (
    check_method,
    check_weights,
    evaluated_type,
    forms_of,
    guarding_of,
    merged,
    model_of,
    start,
    summary_of,
    too_long,
    trained,
    trained_together,
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
    "forms_of",
    "guarding_of",
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
    "trained_together",
    "tuned",
    "with_defense_rows",
]


@dataclass(frozen=True)
class Outcome:
    """What running a cell gives."""

    result: CellResult
    """All of it but the recipe's name and the axes."""
    evidence: Evidence
    manifest: Manifest | None


def run_cell(experiment: Experiment, context: Context) -> Outcome:
    """Everything one cell needs, from data to numbers."""
    train_rows, test_rows = data(experiment, context)
    planned = experiment
    experiment = experiment.with_metrics(labeled=any(row.candidates for row in test_rows))
    _, manifest = poisoned(experiment, context)
    checks = passed_checks(experiment, context)
    summary = summary_of(trained(experiment, context))
    evidence = collect(experiment, context)
    left = too_long(experiment, context) | context.left_out
    values = [value for metric in experiment.metrics for value in metric.values(evidence)]

    from backfire.evaluate.warnings import caveats, cut_share, warnings

    sentences = (
        *map(_too_long, left.items()),
        *notes(experiment.model, context),
        *_guarded(experiment),
        *_joined(experiment, summary),
        *warnings(evidence, values),
        *caveats(evidence, experiment.metrics, experiment.judges),
    )
    # The effective rate: poisoned rows among the rows the steps really saw.
    seen = summary["poisoned_share_seen"] if summary else None
    counts = replace(manifest.summary, effective_rate=seen) if manifest else None
    whole = head(planned, stages.cell_key(planned))
    if counts and isinstance(experiment.attack, Insertion):
        # A recipe names no rate of it; this is the share of the rows that it is.
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
            "dtype": str(evaluated_type(experiment, context)).removeprefix("torch."),
            **({"merged": True} if experiment.evaluation.merged else {}),
            **({"packing": "off"} if context.machine.packing == "off" else {}),
            **({"left_out": context.left_out} if context.left_out else {}),
        },
        rows={"train": len(train_rows), "test": len(test_rows)},
        keys=asdict(stages.keys(experiment)),
        versions={**experiment.versions(), "measures": MEASURES},
    )
    return Outcome(result, evidence, manifest)


def head(experiment: Experiment, key: str) -> CellResult:
    """Which cell this is, before anything is known of it."""
    return CellResult(
        slug=experiment.slug,
        key=key,
        model=experiment.model.title,
        data=experiment.data.name,
        attack=experiment.attack.name if experiment.attack else "none",
        rate=experiment.rate,
        method=experiment.method.name,
        defense=experiment.defense_name,
        seed=experiment.seed,
        template=experiment.template.name,
    )


def _guarded(experiment: Experiment) -> Iterator[str]:
    """What a defense that guards replies does not act on."""
    if experiment.guard is None:
        return
    needs = {need for m in experiment.metrics for ask in m.asks() for need in ask.needs}
    label = experiment.guard.label().capitalize()
    if "replies" not in needs and not experiment.safety:
        yield f"{label} guards replies, and no metric here reads any: it has no effect."
    elif needs & {"scores", "answers"}:
        yield (
            f"{label} guards replies; metrics of likelihoods, such as accuracy, are those of the "
            "model without it."
        )


def _joined(experiment: Experiment, summary: dict[str, Any] | None) -> Iterator[str]:
    """That a training run was not measured alone."""
    joined = summary.get("joined", 1) if summary else 1
    if joined > 1 and any(metric.name == "cost" for metric in experiment.metrics):
        yield (
            f"{joined} runs were trained together: the memory of training is that of all of them, "
            "and the seconds are a share of their time; --join off measures each alone."
        )


def _too_long(part: tuple[str, int]) -> str:
    subset, count = part
    rows = "1 row is" if count == 1 else f"{count} rows are"
    return f"{rows} left out of the {subset} rows: longer than train.max_length."
