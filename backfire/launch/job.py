"""Run one job in this process and write `result.json` or `error.json`; shared by all launchers."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from backfire import stages
from backfire.base.judges import drop_models
from backfire.errors import EXIT_CLASSES, CellError, UserError, exit_class
from backfire.experiment import Experiment, Machine
from backfire.model.resident import Resident
from backfire.pipeline import Context, base, head, run_cell, trained
from backfire.plan import Job
from backfire.progress import Progress
from backfire.recipe import Recipe
from backfire.registry import loaded
from backfire.results.evidence import write as write_evidence
from backfire.results.load import cell as record
from backfire.results.load import outcome as outcome_of
from backfire.results.plugins import lacking
from backfire.store import Store, write_atomic, write_json


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path
    recipe: str

    def cell(self, experiment: Experiment, key: str) -> Path:
        return self.path / "cells" / f"{experiment.slug}-{key}"

    def done(self, experiment: Experiment, key: str) -> bool:
        """Whether the cell has a readable result; a damaged one counts as missing."""
        return bool(outcome_of(self.cell(experiment, key))["status"] == "ok")


def plugins_of(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The plug-ins with a component that these experiments use."""
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


def run_job(
    job: Job,
    folder: RunFolder,
    store: Store,
    machine: Machine,
    progress: Progress,
    resident: Resident | None = None,
) -> str:
    """Run one job; returns `ok` or an exit class (for a cell, `error.json` has the details). The
    worker's resident base is used, and stays for its next job."""
    resident = resident or Resident()
    _reset_globals()
    try:
        context = Context(store, machine, progress, resident=resident)
        if job.kind == "base":
            base(job.experiment.model, context)
        elif job.kind == "train":
            trained(job.experiment, context)
        else:
            _write_result(job, folder, context)
        return "ok"
    except Exception as error:  # the failure of one cell must not stop the others
        resident.release()
        kind, sentence = exit_class(error)
        expected = isinstance(error, CellError)
        trace = traceback.format_exc() if kind == "failed" and not expected else None
        return report(job, folder, kind, sentence, trace)
    finally:
        _release_models()


def _reset_globals() -> None:
    """Let no job depend on those that ran before it in this process."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        torch.clear_autocast_cache()


def _release_models() -> None:
    """Release judges and cached GPU memory before the next job runs in this process."""
    drop_models()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def report(job: Job, folder: RunFolder, kind: str, sentence: str, trace: str | None = None) -> str:
    """Write `error.json` into a cell's folder; a failed stage is reported by the cells that need
    it."""
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


def _write_result(job: Job, folder: RunFolder, context: Context) -> None:
    """Write the cell's folder, `result.json` last."""
    from backfire.launch.environment import environment

    experiment, place = job.experiment, folder.cell(job.experiment, job.key)
    if folder.done(experiment, job.key):
        return
    outcome = run_cell(experiment, context)
    if outcome.result.key != job.key:
        sentence = "An input file of this cell changed during the run; run it again."
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


def open_folder(path: Path, recipe: Recipe, profile: str | None, edits: Sequence[str]) -> RunFolder:
    """Create a run's folder with the recipe text and the list of its current cells."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path, recipe.name)
    write_atomic(path / "recipe.yaml", recipe.text)
    cells = [
        folder.cell(experiment, stages.cell_key(experiment)).name for experiment in recipe.cells
    ]
    plan = {"recipe": recipe.name, "profile": profile, "edits": list(edits), "cells": cells}
    paths = {plugin.sha256: str(plugin.path) for plugin in loaded() if plugin.path}
    plugins = [{**one, "path": paths.get(one["sha256"])} for one in plugins_of(recipe.cells)]
    write_json(path / "run.json", plan | ({"plugins": plugins} if plugins else {}))
    return folder


def read_cell(folder: Path) -> Experiment:
    """Read the experiment of a cell folder."""
    file = folder / "experiment.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a finished cell of a run: experiment.yaml is missing.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{file} cannot be read; run the recipe again.") from None
    if missing := lacking([record(folder)]):
        raise UserError(missing[0])
    return Experiment.make(settings, str(file))
