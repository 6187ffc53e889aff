"""The flow, read top to bottom: data -> poison -> preflight -> train -> evaluate -> result.

Each stage is a pure function of its parents and its own knobs. `store.once` runs it if no equal
stage was run before, by this cell or any other.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from backfire.experiment import Experiment
from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.pipeline.evaluation import evaluated, probed, samples, write_samples
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
from backfire.pipeline.secrets import remembered

__all__ = [
    "Context",
    "base",
    "check_method",
    "check_weights",
    "data",
    "evaluated",
    "merged",
    "model_of",
    "passed_checks",
    "poisoned",
    "preflight_checks",
    "probed",
    "remembered",
    "renderer",
    "run_cell",
    "samples",
    "start",
    "trained",
    "tuned",
    "with_defense_rows",
    "write_samples",
]


def run_cell(experiment: Experiment, context: Context) -> dict[str, Any]:
    """Everything one cell needs, from data to numbers: the content of its `result.json`."""
    train_rows, test_rows = data(experiment, context)
    experiment = experiment.with_metrics(labeled=any(row.candidates for row in test_rows))
    _, manifest = poisoned(experiment, context)
    checks = passed_checks(experiment, context)
    training = trained(experiment, context)
    evidence = remembered(experiment, evaluated(experiment, context), context)
    summary = summary_of(training)
    left = too_long(experiment, context) | context.left_out
    values = [value for metric in experiment.metrics for value in metric.values(evidence)]

    from backfire.evaluate.warnings import caveats, cut_share, warnings

    judges = [judge for metric in experiment.metrics for judge in metric.judges]
    judges += experiment.safety.judges if experiment.safety else ()
    return {
        "values": [asdict(value) for value in values],
        "warnings": [
            *map(_too_long, left.items()),
            *warnings(evidence, values),
            *caveats(evidence, experiment.metrics, judges),
        ],
        "cut_share": cut_share(evidence),
        "preflight": [asdict(check) for check in checks],
        "poison": {**asdict(manifest.summary), **_seen(training)} if manifest else None,
        "train": summary,
        "evaluate": {
            "seconds": round(sum(context.seconds.values()), 2),
            **_type(experiment, context),
            **({"left_out": context.left_out} if context.left_out else {}),
        },
        "rows": {"train": len(train_rows), "test": len(test_rows)},
        "samples": evidence,
        "manifest": manifest,
    }


def _too_long(part: tuple[str, int]) -> str:
    what, count = part
    rows = "1 row is" if count == 1 else f"{count} rows are"
    return f"{rows} left out of the {what} rows: longer than train.max_length."


def _type(experiment: Experiment, context: Context) -> dict[str, str]:
    """The type that the weights are evaluated in, which may be narrower than they are stored."""
    from backfire.model.load import device_of, dtype_of

    dtype = dtype_of(experiment.model, device_of(context.machine.device))
    return {"dtype": str(dtype).removeprefix("torch.")}


def _seen(training: Path) -> dict[str, Any]:
    """The effective rate: poisoned rows among the rows the steps really saw."""
    summary = summary_of(training)
    return {"effective_rate": summary["poisoned_share_seen"]} if summary else {}
