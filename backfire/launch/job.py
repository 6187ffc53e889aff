"""One job in this process; it leaves `result.json` or `error.json`. All launchers share it."""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from backfire import stages
from backfire.base.judges import drop_models
from backfire.errors import EXIT_CLASSES, CellError, exit_class
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context, base, head, run_cell, trained
from backfire.plan import Job
from backfire.progress import Progress
from backfire.recipe import Recipe
from backfire.registry import loaded
from backfire.results.evidence import write as write_evidence
from backfire.results.load import outcome as outcome_of
from backfire.store import Store, write_atomic, write_json


@dataclass(frozen=True)
class Folder:
    """Where the results of a run go."""

    path: Path
    recipe: str

    def cell(self, experiment: Experiment, key: str) -> Path:
        return self.path / "cells" / f"{experiment.slug}-{key}"

    def done(self, experiment: Experiment, key: str) -> bool:
        """Whether its result is there and can be read; one that was torn is made again."""
        return bool(outcome_of(self.cell(experiment, key))["status"] == "ok")


def plugins_of(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The plug-ins that have a component these experiments name."""
    plugins = loaded()
    named = {name for e in experiments for name in _names(e.resolved())} if plugins else set()
    return [facts for plugin in plugins if (facts := plugin.facts(named))["components"]]


def _names(value: Any) -> Iterator[str]:
    """Every `name: ...` in a tree of settings."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        if isinstance(value.get("name"), str):
            yield value["name"]
        for item in value.values():
            yield from _names(item)


def run_job(job: Job, folder: Folder, store: Store, machine: Machine, progress: Progress) -> str:
    """Do one job; returns its exit class: `ok`, or what went wrong (then `error.json` says it)."""
    try:
        context = Context(store, machine, progress)
        if job.kind == "base":
            base(job.experiment.model, context)
        elif job.kind == "train":
            trained(job.experiment, context)
        else:
            _write_result(job, folder, context)
        return "ok"
    except Exception as error:  # one cell's failure must not stop the others
        kind, sentence = exit_class(error)
        known = isinstance(error, CellError)
        trace = traceback.format_exc() if kind == "failed" and not known else None
        return report(job, folder, kind, sentence, trace)
    finally:
        _let_go()


def _let_go() -> None:
    """Hold no model of this job while the next one runs in this process: neither a judge, nor what
    a GPU keeps for later."""
    drop_models()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def report(job: Job, folder: Folder, kind: str, sentence: str, trace: str | None = None) -> str:
    """Leave `error.json` in a cell's folder; the cells that need a stage repeat its error."""
    if job.kind == "cell":
        place = folder.cell(job.experiment, job.key)
        failed = replace(
            head(job.experiment, job.key),
            recipe=folder.recipe,
            axes=job.axes,
            status=kind,
            error=sentence,
            next=EXIT_CLASSES.get(kind, EXIT_CLASSES["failed"]),
        )
        if trace:
            failed = replace(failed, next="Read the traceback in error.json.", traceback=trace)
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / "error.json", failed.to_json())
    return kind


def _write_result(job: Job, folder: Folder, context: Context) -> None:
    """The cell's folder, `result.json` last."""
    from backfire.launch.environment import environment

    experiment, place = job.experiment, folder.cell(job.experiment, job.key)
    if folder.done(experiment, job.key):
        return
    outcome = run_cell(experiment, context)
    if outcome.result.key != job.key:
        sentence = "A file behind this cell changed while the run went on; run it again."
        raise CellError("bad-data", sentence)
    manifest = outcome.manifest
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(
        place / "experiment.yaml",
        yaml.safe_dump(experiment.resolved(), sort_keys=False, allow_unicode=True),
    )
    write_evidence(outcome.evidence, place)
    if manifest:
        write_json(place / "poison.json", manifest.to_json())
    write_json(place / "environment.json", environment(context.machine.device))
    plugins = tuple(plugins_of([experiment]))
    result = replace(outcome.result, recipe=folder.recipe, axes=job.axes, plugins=plugins)
    write_json(place / "result.json", result.to_json())
    (place / "error.json").unlink(missing_ok=True)


def open_folder(path: Path, recipe: Recipe, profile: str | None, edits: Sequence[str]) -> Folder:
    """The folder of a run: the recipe as it was read, and which cells belong to it now."""
    path.mkdir(parents=True, exist_ok=True)
    folder = Folder(path, recipe.name)
    write_atomic(path / "recipe.yaml", recipe.text)
    cells = [
        folder.cell(experiment, stages.cell_key(experiment)).name for experiment in recipe.cells
    ]
    plan = {"recipe": recipe.name, "profile": profile, "edits": list(edits), "cells": cells}
    paths = {plugin.sha256: str(plugin.path) for plugin in loaded() if plugin.path}
    plugins = [{**one, "path": paths.get(one["sha256"])} for one in plugins_of(recipe.cells)]
    write_json(path / "run.json", plan | ({"plugins": plugins} if plugins else {}))
    return folder
