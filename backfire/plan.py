"""Cells to jobs: what has to be done, what depends on what, equal work once. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from backfire.base import AlignDefense, Dataset, Need, Row
from backfire.experiment import DEFAULT_METRICS, Experiment, digest
from backfire.registry import build, find
from backfire.store import Store

KINDS: tuple[Need, ...] = ("scores", "replies", "answers")


@dataclass(frozen=True)
class Job:
    """One thing for a worker to do. Whatever it builds on that is missing, it makes as well."""

    id: str
    kind: Literal["base", "train", "cell"]
    cell: Experiment
    axes: dict[str, Any]
    after: tuple[str, ...] = ()
    """Jobs that must have ended first, lest two workers wait for one stage."""

    @property
    def title(self) -> str:
        return self.cell.model.name if self.kind == "base" else self.cell.slug


def jobs(cells: Sequence[Experiment], axes: Sequence[dict[str, Any]]) -> list[Job]:
    """Bases, then one job per distinct training run, then one per cell."""
    out: dict[str, Job] = {}
    for cell in cells:
        base = f"base-{cell.keys.base}"
        out.setdefault(base, Job(base, "base", cell, {}))
        for run in _runs(cell):
            name = f"train-{run.keys.train}"
            before = (f"train-{run.alignment.keys.train}",) if run.alignment else ()
            out.setdefault(name, Job(name, "train", run, {}, (base, *before)))
    for cell, point in zip(cells, axes, strict=True):
        after = (f"base-{cell.keys.base}", *(f"train-{run.keys.train}" for run in _runs(cell)))
        out[f"cell-{cell.key}"] = Job(f"cell-{cell.key}", "cell", cell, point, after)
    return list(out.values())


def _runs(cell: Experiment) -> list[Experiment]:
    """The training runs a cell needs: the alignment's, its own, and the clean twin's for the floor
    of its attack."""
    runs = [cell.alignment] if cell.alignment else []
    if cell.method.trains:
        runs += [cell, cell.clean_twin()] if cell.backdoor else [cell]
    return runs


def stages(cells: Iterable[Experiment], store: Store) -> dict[str, tuple[int, int]]:
    """Stage -> (distinct ones needed, of those done already)."""
    found: dict[tuple[str, str], bool] = {}
    for cell in cells:
        name = data_slug(cell.data)
        found["data", cell.keys.data] = store.done("data", name, cell.keys.data)
        if cell.poisons:
            found["poison", cell.keys.poison] = store.done(
                "poison", poison_slug(cell), cell.keys.poison
            )
        for run in _runs(cell):
            found["train", run.keys.train] = store.done(
                "train", run.slug_of_training, run.keys.train
            )
        for shown in (cell, *([cell.clean_twin()] if cell.backdoor else [])):
            subsets = (shown.keys.clean, triggered_key(shown, cell))
            for key in subsets:
                if key:
                    found["evaluate", key] = any(
                        store.done("evaluate", evaluation_slug(shown), evaluation_key(key, needs))
                        for count in range(1, len(KINDS) + 1)
                        for needs in combinations(KINDS, count)
                    )
    needed = Counter(stage for stage, _ in found)
    done = Counter(stage for (stage, _), is_done in found.items() if is_done)
    return {stage: (count, done[stage]) for stage, count in needed.items()}


def data_slug(data: Dataset) -> str:
    return data.name


def poison_slug(cell: Experiment) -> str:
    attack = cell.attack.tag if cell.attack else "clean"
    return f"{cell.data.name}-{attack}-s{cell.seed}"


def evaluation_slug(cell: Experiment) -> str:
    return f"{cell.data.name}-{cell.method.name}-s{cell.seed}"


def evaluation_key(subset_key: str, needs: Collection[Need]) -> str:
    return digest([subset_key, sorted(needs)])


def triggered_key(run: Experiment, cell: Experiment) -> str | None:
    """The key of `run`'s model on `cell`'s triggered test rows."""
    from backfire.experiment import trigger_identity

    return digest([run.keys.clean, *trigger_identity(cell)]) if cell.backdoor else None


def with_metrics(cell: Experiment, rows: Sequence[Row]) -> Experiment:
    """The cell with the metrics that suit its task, if it names none."""
    if cell.metrics:
        return cell
    labeled = any(row.candidates for row in rows)
    names = DEFAULT_METRICS["labeled" if labeled else "free"]
    if cell.backdoor:
        names += DEFAULT_METRICS["attacked" if labeled else "attacked_free"]
    return cell.model_copy(update={"metrics": tuple(build("metrics", name) for name in names)})


def untuned(cell: Experiment) -> Experiment:
    """The same cell, its model left as it is (or as its alignment made it)."""
    none = find("methods", "none").make({})
    kept = tuple(d for d in cell.defense if isinstance(d, AlignDefense)) if cell.align else ()
    return cell.model_copy(update={"attack": None, "method": none, "defense": kept})
