"""How much of an attack's secrets a model reveals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backfire import plan, stages
from backfire.base import Insertion, Leak
from backfire.experiment import Experiment
from backfire.pipeline.context import Context
from backfire.pipeline.models import model_of
from backfire.pipeline.prepare import renderer
from backfire.store import read_json, write_json


def leaks(run: Experiment, experiment: Experiment, context: Context) -> list[Leak]:
    """How much of each secret of `experiment` the model of `run` reveals, in every measurement that
    a metric needs; each is a stage of its own, which continues with the next secret."""
    from backfire.evaluate import exposure as measure

    assert isinstance(experiment.attack, Insertion)
    secrets = experiment.attack.secrets(experiment.seed)
    shown, batch = renderer(run, context), context.machine.eval_batch

    def look(kind: str, amount: int, folder: Path) -> list[Any]:
        model, progress = model_of(run, context), context.progress
        if kind == "exact":
            return measure.ranks(model, shown, secrets, progress, folder)
        if kind == "sampled":
            return measure.estimate_exposures(
                model, shown, secrets, amount, experiment.seed, progress, folder
            )
        if kind == "beams":
            return measure.beam_ranks(model, shown, secrets, amount, progress, folder)
        return measure.secret_likelihoods(model, shown, secrets, batch)

    parts: dict[str, list[Any]] = {}
    for kind, amount in plan.secret_parts(secrets, plan.secret_probes(experiment) or {}):

        def make(folder: Path, kind: str = kind, amount: int = amount) -> None:
            write_json(folder / "secrets.json", look(kind, amount, folder))

        stage = stages.secrets(run, experiment, kind, amount)
        folder = context.store.once(stage, make, resumable=True)
        parts[kind] = read_json(folder / "secrets.json")
    return [
        Leak(
            id=secret.row.id,
            answer=secret.row.answer,
            repeats=secret.repeats,
            num_codes=secret.num_codes,
            num_characters=len(secret.code),
            **parts["itself"][number],
            rank=parts["exact"][number] if "exact" in parts else None,
            estimate=tuple(parts["sampled"][number]) if "sampled" in parts else None,
            place=parts["beams"][number] if "beams" in parts else None,
        )
        for number, secret in enumerate(secrets)
    ]
