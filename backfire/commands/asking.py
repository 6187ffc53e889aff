"""What it costs that defenses ask a cell's base about its training rows, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backfire.base import DataDefense, Measure
from backfire.evaluate.effort import PROBED, REPLY, tokens_read
from backfire.experiment import Evaluation, Experiment
from backfire.registry import build
from backfire.stages import keys
from backfire.train import probe_settings

if TYPE_CHECKING:
    from backfire.commands.estimate import Rows, Weights


def _asking(run: Experiment) -> list[DataDefense]:
    acting = run.acting if run.method.trains else ()
    return [one for one in acting if isinstance(one, DataDefense) and one.measures]


def measures(run: Experiment) -> frozenset[Measure]:
    """What the base measures in the training rows."""
    return frozenset[Measure]().union(*(one.measures for one in _asking(run)))


def key(run: Experiment) -> str:
    """Equal for runs whose defenses ask the same of the same rows."""
    return str([keys(run).base, keys(run).poison, [one.identity() for one in _asking(run)]])


def flops(run: Experiment, rows: Rows, weights: Weights) -> float:
    """Floating-point operations of that, as many as would take as long in a forward pass."""
    answers = sum(answer for _, answer in rows.lengths) / len(rows.lengths)
    whole, prompts = rows.count * rows.tokens, rows.count * (rows.tokens - answers)
    return 2.0 * weights.parameters * tokens_read(measures(run), rows.count, prompts, whole)


def as_cell(run: Experiment, rows: Rows | None) -> Experiment:
    """A cell that needs as much memory: with the probe as its training, if there is one, and with
    replies and answers measured on as many rows."""
    count = rows.count if rows else 1
    probed = bool(measures(run) & PROBED)
    settings = probe_settings.settings(count)
    kept = {name: getattr(run.train, name) for name in ("compute", "max_length", "on_long_row")}
    return run.model_copy(
        update={
            "method": build("methods", probe_settings.METHOD if probed else "none"),
            "data": run.data.model_copy(update={"test_rows": None}),
            **{"align": None, "defense": (), "safety": None, "attack": None},
            "train": settings.model_copy(update=kept),
            "evaluation": Evaluation(max_new_tokens=REPLY),
            "metrics": tuple(build("metrics", name) for name in ("exact-match", "perplexity")),
        }
    )
