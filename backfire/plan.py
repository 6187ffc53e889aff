"""Cells to jobs: what has to be done, what depends on what, equal work once. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from backfire.base import AlignDefense, Dataset, Insertion, Need, Row, Secret, SecretProbe
from backfire.experiment import DEFAULT_METRICS, MEASURES, Experiment, digest
from backfire.registry import build, find
from backfire.store import Store

KINDS: tuple[Need, ...] = ("scores", "replies", "answers")


@dataclass(frozen=True)
class Job:
    """One thing for a worker to do. Whatever it builds on that is missing, it makes as well."""

    id: str
    kind: Literal["base", "train", "cell"]
    experiment: Experiment
    axes: dict[str, Any]
    after: tuple[str, ...] = ()
    """Jobs that must have ended first, so that no two workers wait for one stage."""

    @property
    def key(self) -> str:
        """Of what it makes, as it was when the jobs were made: a cell's own is computed anew from
        its files, which may be gone by then."""
        return self.id.partition("-")[2]

    @property
    def title(self) -> str:
        return self.experiment.model.name if self.kind == "base" else self.experiment.slug


def jobs(cells: Sequence[Experiment], axes: Sequence[dict[str, Any]]) -> list[Job]:
    """Bases, then one job per distinct training run, then one per cell."""
    out: dict[str, Job] = {}
    for experiment in cells:
        base = f"base-{experiment.keys.base}"
        out.setdefault(base, Job(base, "base", experiment, {}))
        for run in _runs(experiment):
            name = f"train-{run.keys.train}"
            before = (f"train-{run.alignment.keys.train}",) if run.alignment else ()
            out.setdefault(name, Job(name, "train", run, {}, (base, *before)))
    for experiment, point in zip(cells, axes, strict=True):
        after = (
            f"base-{experiment.keys.base}",
            *(f"train-{run.keys.train}" for run in _runs(experiment)),
        )
        out[f"cell-{experiment.key}"] = Job(
            f"cell-{experiment.key}", "cell", experiment, point, after
        )
    return list(out.values())


def _runs(experiment: Experiment) -> list[Experiment]:
    """The training runs a cell needs: the alignment's, its own, and the clean twin's for the floor
    of its attack."""
    runs = [experiment.alignment] if experiment.alignment else []
    if experiment.method.trains:
        runs += [experiment, experiment.clean_twin()] if experiment.backdoor else [experiment]
    return runs


def stages(cells: Iterable[Experiment], store: Store) -> dict[str, tuple[int, int]]:
    """Stage -> (distinct ones needed, of those done already)."""
    found: dict[tuple[str, str], bool] = {}
    for experiment in cells:
        name = data_slug(experiment.data)
        found["data", experiment.keys.data] = store.done("data", name, experiment.keys.data)
        if experiment.poisons:
            found["poison", experiment.keys.poison] = store.done(
                "poison", poison_slug(experiment), experiment.keys.poison
            )
        for run in _runs(experiment):
            found["train", run.keys.train] = store.done(
                "train", run.slug_of_training, run.keys.train
            )
        for shown in (experiment, *([experiment.clean_twin()] if experiment.backdoor else [])):
            subsets = (shown.keys.clean, triggered_key(shown, experiment))
            for key in subsets:
                if key:
                    found["evaluate", key] = any(
                        store.done("evaluate", evaluation_slug(shown), evaluation_key(key, needs))
                        for count in range(1, len(KINDS) + 1)
                        for needs in combinations(KINDS, count)
                    )
        found |= _secrets(experiment, store)
    needed = Counter(stage for stage, _ in found)
    done = Counter(stage for (stage, _), is_done in found.items() if is_done)
    return {stage: (count, done[stage]) for stage, count in needed.items()}


def data_slug(data: Dataset) -> str:
    return data.name


def poison_slug(experiment: Experiment) -> str:
    attack = experiment.attack.tag if experiment.attack else "clean"
    return f"{experiment.data.name}-{attack}-s{experiment.seed}"


def evaluation_slug(experiment: Experiment) -> str:
    return f"{experiment.data.name}-{experiment.method.name}-s{experiment.seed}"


def evaluation_key(subset_key: str, needs: Collection[Need]) -> str:
    versions = [MEASURES[need] for need in sorted(needs) if need in MEASURES]
    return digest([subset_key, sorted(needs), *versions])


def triggered_key(run: Experiment, experiment: Experiment) -> str | None:
    """The key of `run`'s model on `cell`'s triggered test rows."""
    from backfire.experiment import trigger_identity

    return digest([run.keys.clean, *trigger_identity(experiment)]) if experiment.backdoor else None


def secret_probes(experiment: Experiment) -> dict[SecretProbe, int] | None:
    """How the cell's metrics want its secrets looked for, and among how many; None: not at all."""
    asked = [metric.secrets for metric in experiment.metrics if metric.secrets is not None]
    most: dict[SecretProbe, int] = {}
    for kind, amount in (pair for one in asked for pair in one.items()):
        most[kind] = max(amount, most.get(kind, 0))
    return most if asked else None


def secret_stages(
    secrets: Sequence[Secret], wanted: Mapping[SecretProbe, int]
) -> list[tuple[str, int]]:
    """What is measured of the secrets, and among how many; the exact rank only of codes that are
    few enough."""
    found = [("itself", 0)] if secrets else []
    for kind, amount in wanted.items():
        if kind == "exact":
            found += [(kind, 0)] if secrets and secrets[0].num_codes <= amount else []
        elif amount and secrets:
            found.append((kind, amount))
    return found


def secrets_key(run: Experiment, experiment: Experiment, kind: str, amount: int) -> str:
    """The key of one measurement of `run`'s model on the secrets of `cell`: which they are counts,
    not how often they were inserted."""
    attack = experiment.attack
    secrets = attack.secrets(experiment.seed) if isinstance(attack, Insertion) else []
    which = [[s.row.id, s.row.instruction, s.row.answer, s.code] for s in secrets]
    drawn = experiment.seed if kind == "sampled" else None
    shown = [run.template.identity(), run.train.seen]
    how = [kind, amount, drawn, MEASURES.get(kind, 1)]
    return digest([run.keys.tuned, *shown, which, *how])


def _secrets(experiment: Experiment, store: Store) -> dict[tuple[str, str], bool]:
    wanted, found = secret_probes(experiment), dict[tuple[str, str], bool]()
    if wanted is None or not isinstance(experiment.attack, Insertion):
        return found
    for run in (experiment, untuned(experiment)) if experiment.method.trains else (experiment,):
        for kind, amount in secret_stages(experiment.attack.secrets(experiment.seed), wanted):
            key = secrets_key(run, experiment, kind, amount)
            found["secrets", key] = store.done("secrets", evaluation_slug(run), key)
    return found


def with_metrics(experiment: Experiment, rows: Sequence[Row]) -> Experiment:
    """The cell with the metrics that suit its task, if it names none."""
    if experiment.metrics:
        return experiment
    labeled = any(row.candidates for row in rows)
    names = DEFAULT_METRICS["labeled" if labeled else "free"]
    if experiment.backdoor:
        names += DEFAULT_METRICS["attacked" if labeled else "attacked_free"]
    return experiment.model_copy(
        update={"metrics": tuple(build("metrics", name) for name in names)}
    )


def untuned(experiment: Experiment) -> Experiment:
    """The same cell, its model left as it is (or as its alignment made it)."""
    none = find("methods", "none").make({})
    kept = (
        tuple(d for d in experiment.defense if isinstance(d, AlignDefense))
        if experiment.align
        else ()
    )
    return experiment.model_copy(update={"attack": None, "method": none, "defense": kept})
