"""Run one job in this process and write how it ended; shared by all launchers."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from backfire import stages
from backfire.base.judges import drop_models
from backfire.data.weights import first_line
from backfire.errors import (
    EXIT_CLASSES,
    Away,
    Busy,
    CellError,
    GpuError,
    Pause,
    Unanswered,
    UserError,
    exit_class,
    was_away,
)
from backfire.experiment import Experiment, Machine
from backfire.launch import imports
from backfire.launch.folder import plugins_of
from backfire.model.resident import Resident
from backfire.pipeline import Context, base, head, run_cell, trained, trained_together
from backfire.plan import Job
from backfire.progress import Progress
from backfire.resources import cores
from backfire.results.evidence import write as write_evidence
from backfire.results.load import cell as record
from backfire.results.load import outcome as outcome_of
from backfire.results.plugins import lacking
from backfire.store import Store, read_json, write_atomic, write_json
from backfire.text import without_secrets


class Ended(NamedTuple):
    """How a job ended."""

    kind: str
    """`ok` or an exit class."""
    sentence: str = ""
    trace: str | None = None


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

    @property
    def stages(self) -> Path:
        """The folder that says how the jobs of bases and training runs ended, a file each."""
        return self.path / "stages"

    def ended(self, job: Job, since: float) -> Ended | None:
        """How a job ended, if it did: a cell once it has a result, anything else after `since`
        (time of the file system). What a full disk has stopped goes on once there is space."""
        if job.kind == "cell" and self.done(job.experiment, job.key):
            return Ended("ok")
        file = self._outcome(job)
        try:
            if file.stat().st_mtime < since:
                return None
            content = read_json(file)
            if (kind := content["status"]) == "disk-full":
                return None
            return Ended(kind, content.get("error") or "", content.get("traceback"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _outcome(self, job: Job) -> Path:
        if job.kind == "cell":
            return self.cell(job.experiment, job.key) / "error.json"
        return self.stages / f"{job.id}.json"


def run_job(
    job: Job,
    folder: RunFolder,
    store: Store,
    machine: Machine,
    progress: Progress,
    resident: Resident | None = None,
) -> str:
    """Run one job and write how it ended; returns `ok` or an exit class. The worker's resident base
    is used, and stays for its next job.

    Raises:
        Pause: the job is not done; it goes on later.
        GpuError: the GPU does not answer; no job succeeds in this process any more.
    """
    resident, failed = resident or Resident(), True
    set_threads(machine)
    imports.keep()
    _reset_globals()
    try:
        progress(0, 1, "start")
        context = Context(store, machine, progress, resident=resident)
        if job.kind == "base":
            base(job.experiment.model, context)
        elif job.kind == "train":
            trained(job.experiment, context)
        else:
            _write_result(job, folder, context)
        failed = False
        return "ok" if job.kind == "cell" else report(job, folder, "ok", "")
    except Exception as error:  # the failure of one cell must not stop the others
        return _report_error(job, folder, error, machine, resident)
    finally:
        _release_models(failed=failed)


def run_together(
    jobs: Sequence[Job],
    folder: RunFolder,
    store: Store,
    machine: Machine,
    progresses: Sequence[Progress],
    resident: Resident,
) -> list[str | Pause]:
    """Run training jobs as one and write how each ended; returns `ok`, an exit class, or why it is
    put back, for each. One that runs out of memory is put back, to run alone.

    Raises:
        Pause, GpuError: as `run_job`; for all of them.
    """
    failed = True
    set_threads(machine)
    imports.keep()
    _reset_globals()

    def outcome(job: Job, error: Exception | Pause | None) -> str | Pause:
        if error is None:
            return report(job, folder, "ok", "")
        if isinstance(error, Pause):
            return error
        try:
            kind = exit_class(error)[0]
            if kind != "oom":
                return _report_error(job, folder, error, machine, resident)
            resident.release()
            return Busy("memory, to run alone")
        except Away as away:
            return away

    try:
        for progress in progresses:
            progress(0, 1, "start")
        contexts = [Context(store, machine, each, resident=resident) for each in progresses]
        errors = trained_together([job.experiment for job in jobs], contexts)
        failed = any(error is not None for error in errors)
        outcomes = [outcome(job, error) for job, error in zip(jobs, errors, strict=True)]
        errors.clear()
        return outcomes
    finally:
        _release_models(failed=failed)


def _report_error(
    job: Job, folder: RunFolder, error: Exception, machine: Machine, resident: Resident
) -> str:
    """Write which error ended a job; returns its exit class.

    Raises:
        Away: it may pass by itself.
        GpuError: the GPU does not answer.
    """
    refuse_broken_gpu(error, machine.device)
    resident.release()
    kind, sentence = exit_class(error)
    if was_away(error):
        raise Away(sentence, kind if isinstance(error, Unanswered) else "io") from error
    expected = isinstance(error, CellError)
    lines = traceback.format_exception(error) if kind == "failed" and not expected else []
    return report(job, folder, kind, sentence, "".join(lines) or None)


def refuse_broken_gpu(error: Exception, device: str = "auto") -> None:
    """After an error such as an illegal memory access, or when the GPU is gone, every later call
    fails too: other jobs must not be tried, and counted as failed, in this process. That the GPU
    could not be used at all is asked only if `device` names one.

    Raises:
        GpuError: it is so.
    """
    torch = sys.modules.get("torch")
    named = device.startswith("cuda")
    if torch is None or not (torch.cuda.is_initialized() or (named and torch.cuda.device_count())):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as reason:
        raise GpuError(
            f"The GPU of {os.uname().nodename} does not answer any more: {first_line(reason)}. "
            "Finished work is kept; run the same command again, or on another machine."
        ) from error


def _reset_globals() -> None:
    """Let no job depend on those that ran before it in this process."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        torch.clear_autocast_cache()


def _release_models(*, failed: bool) -> None:
    """Release judges, cached GPU memory, and models that the traceback of an error holds, before
    the next job runs in this process."""
    drop_models()
    if failed:
        gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        gc.collect()
        with contextlib.suppress(RuntimeError):  # the GPU is broken, and that is said already
            torch.cuda.empty_cache()


def set_threads(machine: Machine) -> None:
    """Divide the cores among the workers: two workers of one thread are faster than one of two.

    `OMP_NUM_THREADS` takes precedence, as users of shared machines expect.
    """
    import torch

    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # may list several levels
    threads = machine.threads or (int(variable) if variable.strip().isdigit() else 0)
    torch.set_num_threads(threads or max(1, cores() // machine.workers))


def report(job: Job, folder: RunFolder, kind: str, sentence: str, trace: str | None = None) -> str:
    """Write how a job ended: `error.json` in a cell's folder, or a file for the stage, so that no
    worker repeats it in this round."""
    file, sentence = folder._outcome(job), without_secrets(sentence)
    trace = without_secrets(trace) if trace else None
    content: dict[str, Any] = {"status": kind, "error": sentence, "traceback": trace}
    if job.kind == "cell":
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
        content = failed.to_json()
    with contextlib.suppress(OSError):  # a full disk must not hide the first error
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
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
    write_json(
        place / "environment.json", environment(context.machine.device, context.machine.devices)
    )
    plugins = tuple(plugins_of([experiment]))
    result = replace(outcome.result, recipe=folder.recipe, axes=job.axes, plugins=plugins)
    write_json(place / "result.json", result.to_json())
    (place / "error.json").unlink(missing_ok=True)


def read_cell(folder: Path) -> Experiment:
    """Read the experiment of a cell folder."""
    file = folder / "experiment.yaml"
    if some := sorted((folder / "cells").glob("*/experiment.yaml")):
        raise UserError(f"{folder} is a run; name one of its cells, such as {some[0].parent}.")
    if not file.is_file():
        raise UserError(f"{folder} is not a finished cell of a run: experiment.yaml is missing.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{file} cannot be read; run the recipe again.") from None
    if missing := lacking([record(folder)]):
        raise UserError(missing[0])
    return Experiment.make(settings, str(file))


def has_changed(folder: Path, experiment: Experiment) -> bool:
    """Whether the model of a finished cell would be another one now, since an input file or the
    version of a component has changed."""
    now = stages.keys(experiment).tuned
    return record(folder).keys.get("tuned", now) != now
