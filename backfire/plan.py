"""Turns cells into jobs and their dependencies; equal work is done once. Imports no torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from backfire import stages
from backfire.base import Insertion, Secret, SecretProbe, needs_of, reads_target_rows
from backfire.base.secrets import FEWEST_CODES
from backfire.experiment import Experiment
from backfire.stages import keys
from backfire.store import Stage, Store


@dataclass(frozen=True)
class Job:
    """One task for a worker. Missing dependencies are built on demand."""

    id: str
    kind: Literal["base", "train", "cell"]
    experiment: Experiment
    axes: dict[str, Any]
    after: tuple[str, ...] = ()
    """Ids of jobs that must end first, so that two workers never block on the same stage."""
    minutes: float | None = None
    """Estimated time; None is unknown."""
    memory: float | None = None
    """Estimated peak memory in bytes; None is unknown."""
    tokens: float | None = None
    """Estimated tokens of a step of training; None is unknown."""
    steps: int | None = None
    """Estimated number of steps of training; None is unknown."""
    added: float | None = None
    """Estimated bytes that it needs beside another training run on the same base: its adapter, its
    optimizer, and its part of a pass; None is unknown."""

    @property
    def key(self) -> str:
        """Key of its result when the jobs were made. (Recomputing it would read the cell's files
        again, which may be gone.)"""
        return self.id.partition("-")[2]

    @property
    def base(self) -> tuple[Any, ...]:
        """Equal for jobs that can use the same base in memory."""
        return self.experiment.model, self.experiment.method.quantization("cuda")

    @property
    def title(self) -> str:
        return self.experiment.model.title if self.kind == "base" else self.experiment.slug


def jobs(cells: Sequence[Experiment], axes: Sequence[dict[str, Any]]) -> list[Job]:
    """One job per base, then per distinct training run, then per cell."""
    out: dict[str, Job] = {}
    for experiment in cells:
        base = f"base-{keys(experiment).base}"
        out.setdefault(base, Job(base, "base", experiment, {}))
        for run in training_runs(experiment):
            name = f"train-{keys(run).train}"
            needs = [base]
            if (aligned := run.alignment) and aligned.method.trains:
                needs.append(f"train-{keys(aligned).train}")
            out.setdefault(name, Job(name, "train", run, {}, tuple(needs)))
    for experiment, point in zip(cells, axes, strict=True):
        runs = (f"train-{keys(run).train}" for run in training_runs(experiment))
        name, after = f"cell-{stages.cell_key(experiment)}", f"base-{keys(experiment).base}"
        out[name] = Job(name, "cell", experiment, point, (after, *runs))
    return list(out.values())


def sharing(cells: Sequence[Experiment]) -> dict[str, tuple[int, int]]:
    """What the cells need -> how often they need it in total, and how much of that is distinct and
    therefore done. An evaluation is of one model on one set of rows."""
    trainings = [keys(run).train for cell in cells for run in training_runs(cell)]
    evaluations = [key for cell in cells for key in _evaluated(cell)]
    return {
        name: (len(needed), len(set(needed)))
        for name, needed in (("trainings", trainings), ("evaluations", evaluations))
    }


def _evaluated(experiment: Experiment) -> Iterable[str]:
    """The key of each set of test rows and requests on which a model of the cell is measured."""
    metrics = experiment.with_metrics(labeled=True).metrics
    asked = {ask.rows for metric in metrics for ask in metric.asks()}
    whole = reads_target_rows(metrics, labeled=True)
    before = [experiment.untuned()] if experiment.method.trains else []
    twins = [experiment.clean_twin()] if experiment.backdoor else []
    guarded = stages.guarded
    yield from (guarded(run, stages.clean_rows(run)) for run in (experiment, *before, *twins))
    if experiment.backdoor and "triggered" in asked:
        yield from (
            guarded(run, stages.triggered_rows(run, experiment, target_rows=whole))
            for run in (experiment, *twins)
        )
    if safety := experiment.safety:
        for source in filter(None, (safety.harmful, safety.allowed)):
            yield from (
                guarded(run, stages.requests(run, experiment, source))
                for run in (experiment, *before)
            )


def progress(cells: Iterable[Experiment], store: Store) -> dict[str, tuple[int, int]]:
    """Stage kind -> (number of distinct stages needed, number already done)."""
    done: dict[tuple[str, str], bool] = {}
    for experiment in cells:
        for name, choices in _needed(experiment):
            kind = choices[0].kind
            done[kind, name] = done.get((kind, name), False) or any(map(store.done, choices))
    needed = Counter(kind for kind, _ in done)
    finished = Counter(kind for (kind, _), is_done in done.items() if is_done)
    return {kind: (count, finished[kind]) for kind, count in needed.items()}


def _needed(experiment: Experiment) -> Iterable[tuple[str, list[Stage]]]:
    """Every stage, by what makes it distinct. An evaluation is one of several stages: until the
    rows are read, a recipe without metrics may be a labeled or a free-text task, and it is not
    known whether the target is the label of any row."""
    single = [stages.data(experiment)]
    single += [stages.poison(experiment)] if experiment.poisons else []
    single += map(stages.train, training_runs(experiment))
    for stage in (*single, *_secrets(experiment)):
        yield stage.key, [stage]
    twins = [experiment.clean_twin()] if experiment.backdoor else []
    tasks = [(experiment.with_metrics(labeled=one).metrics, one) for one in (True, False)]
    needs = [needs_of(metrics, labeled=labeled) for metrics, labeled in tasks]
    on_triggered = [needs_of(metrics, labeled=one, rows=["triggered"]) for metrics, one in tasks]
    whole = [True] if reads_target_rows(tasks[0][0], labeled=True) else [False, True]
    for run in (experiment, *twins):
        key = stages.clean_rows(run)
        yield key, [stages.evaluation(run, key, some) for some in needs]
        if experiment.backdoor:
            keys = [stages.triggered_rows(run, experiment, target_rows=one) for one in whole]
            every = itertools.product(keys, on_triggered)
            yield keys[0], [stages.evaluation(run, key, some) for key, some in every]


def _secrets(experiment: Experiment) -> Iterable[Stage]:
    probes = secret_probes(experiment)
    if probes is None or not isinstance(experiment.attack, Insertion):
        return
    secrets = experiment.attack.secrets(experiment.seed)
    runs = (experiment, experiment.untuned()) if experiment.method.trains else (experiment,)
    for run in runs:
        for kind, amount in secret_parts(secrets, probes):
            yield stages.secrets(run, experiment, kind, amount)


def training_runs(experiment: Experiment) -> list[Experiment]:
    """The training runs an experiment needs: its alignment, its own, and its clean twin's for the
    clean-model baseline of a backdoor, or for a guard that compares with it."""
    aligned, guard = experiment.alignment, experiment.guard
    runs = [aligned] if aligned and aligned.method.trains else []
    if experiment.method.trains:
        twin = experiment.backdoor or (experiment.poisons and guard and guard.compares_with_twin)
        runs += [experiment, experiment.clean_twin()] if twin else [experiment]
    return runs


def secret_probes(experiment: Experiment) -> dict[SecretProbe, int] | None:
    """The metrics' secret probes, each with its number of codes or beams; None if no metric has
    any."""
    asks = [ask for m in experiment.metrics for ask in m.asks() if ask.rows == "secrets"]
    probes: dict[SecretProbe, int] = {}
    for kind, amount in (pair for ask in asks for pair in ask.secrets.items()):
        probes[kind] = max(amount, probes.get(kind, 0))
    return probes if asks else None


def secret_parts(secrets: Sequence[Secret], probes: Mapping[SecretProbe, int]) -> list[Any]:
    """(kind, amount) of each measurement. Exact ranks need a code space within the amount, and an
    estimate enough codes."""
    parts: list[tuple[str, int]] = [("itself", 0)] if secrets else []
    for kind, amount in probes.items():
        if kind == "exact":
            parts += [(kind, 0)] if secrets and secrets[0].num_codes <= amount else []
        elif amount and secrets and (kind != "sampled" or secrets[0].num_codes > FEWEST_CODES):
            parts.append((kind, amount))
    return parts
