"""`backfire plan`: all that needs the recipe or the network, so that workers need neither."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from backfire import plan
from backfire.base import Dataset
from backfire.commands import asking, validate
from backfire.commands.estimate import (
    ASSUMED,
    evaluation_seconds,
    flops_per_token,
    high_rates,
    method_key,
    model_folder,
    rough_weights,
    rows_by_key,
    rows_key,
    tokens_of,
    too_large,
)
from backfire.experiment import Experiment
from backfire.launch.folder import check_writable, write_plan
from backfire.launch.resolve import pin_models, resolve_auto, types_of
from backfire.model.types import GPU, Types, assume, gpu_bytes
from backfire.plan import Job
from backfire.recipe import Recipe
from backfire.resources import has_gpu, ram_bytes
from backfire.store import Store
from backfire.terminal import say


def write(
    recipe: Recipe, out: Path, device: str, *, profile: str | None, edits: Sequence[str]
) -> str:
    """Plan a recipe into `out`: check it, fetch its models and data, and write its jobs with their
    estimates; returns a sentence.

    Raises:
        UserError, CellError: the recipe or its data are invalid; nothing was written.
    """
    check_writable(out)
    console, store, types = Console(stderr=True), Store(), types_for(device)
    recipe = resolve_auto(pin_models(recipe), types)
    check(recipe, store, console)
    with console.status("Fetching the data"):
        _fetch_rows(recipe)
    with console.status("Estimating time and memory"):
        jobs = with_estimates(plan.jobs(recipe.cells, recipe.axes), recipe, store, types)
    write_plan(out, recipe, jobs, device=types.device, profile=profile, edits=edits)
    cells = sum(job.kind == "cell" for job in jobs)
    return f"Planned {cells} cells in {len(jobs)} jobs; work on them with: backfire work {out}"


def check(recipe: Recipe, store: Store, console: Console, has: float | None = None) -> None:
    """All checks before the first job; the models and the training data are fetched for them.

    Args:
        has: memory in bytes; a note is printed for each model that cannot fit.

    Raises:
        UserError, CellError: the first problem.
    """
    if has is not None:
        for line in too_large(recipe, has, store):  # before the model is downloaded
            say(line, console)
    with console.status("Checking the data"):
        validate.preflight_all(recipe, store)
    for line in high_rates(recipe):
        say(line, console)


def memory_of(device: str, types: Types) -> int:
    """Bytes that this machine has for a run: of the GPU, or main memory."""
    return gpu_bytes(device) if types.device == "cuda" else ram_bytes()


def with_estimates(jobs: Sequence[Job], recipe: Recipe, store: Store, types: Types) -> list[Job]:
    """The jobs with their estimated minutes and peak memory."""
    from backfire.commands.forecast import Forecast

    forecast, memories = Forecast(recipe, types), dict[str, dict[str, Any]]()

    def memory(cell: Experiment) -> dict[str, Any]:
        alike = [method_key(cell), cell.defense_name, rows_key(cell), cell.train, cell.evaluation]
        key = str([*alike, sorted(asking.measures(cell))])
        if key not in memories:
            need, size = forecast.memory(cell), forecast.size(cell)
            memories[key] = {}
            if need and size:
                added = 4 * size.added + need.state + need.passes
                memories[key] = {"memory": need.total, "added": added}
        return memories[key]

    return [
        job if job.kind == "base" else replace(job, **memory(job.experiment))
        for job in with_minutes(jobs, store, types)
    ]


def with_minutes(jobs: Sequence[Job], store: Store, types: Types) -> list[Job]:
    """The jobs with the estimated number and tokens of steps, and their minutes at an assumed
    speed, so that those on which the most waits come first. Imports no torch."""
    device: Literal["cpu", "gpu"] = "gpu" if types.device == "cuda" else "cpu"
    cells = [job.experiment for job in jobs if job.kind != "base"]
    rows, sizes = rows_by_key(cells, store), {method_key(cell): cell for cell in cells}
    weights = {k: rough_weights(c, model_folder(c.model, store)) for k, c in sizes.items()}

    def minutes(job: Job) -> float | None:
        cell = job.experiment
        seen, size = rows[rows_key(cell)], weights[method_key(cell)]
        if not seen or not size:
            return None
        if job.kind == "cell":
            return evaluation_seconds(cell, seen, size, device) / 60
        training = tokens_of(cell, seen) * flops_per_token(cell, size)
        return (training + asking.flops(cell, seen, size)) / ASSUMED[device] / 60

    def steps(job: Job) -> dict[str, Any]:
        seen, train = rows[rows_key(job.experiment)], job.experiment.train
        if not seen or job.kind != "train":
            return {}
        # The start that all rows share runs once.
        count = min(train.batch_size, seen.count)
        tokens = seen.shared + count * (seen.tokens - seen.shared)
        each = math.ceil(seen.count / train.batch_size)
        return {"tokens": tokens, "steps": train.max_steps or math.ceil(train.epochs * each)}

    return [
        job if job.kind == "base" else replace(job, minutes=minutes(job), **steps(job))
        for job in jobs
    ]


def types_for(device: str) -> Types:
    """The types for the workers' device, which need not be on this machine: any GPU is then assumed
    to support bfloat16."""
    if device.startswith("cuda") and not has_gpu():
        assume(GPU)
        return GPU
    return types_of(device)


def _fetch_rows(recipe: Recipe) -> None:
    """Read all rows that the checks have not read, so that those of the hub are on this machine."""
    distinct = {
        str([source.identity(), split]): (source, split)
        for cell in recipe.cells
        for source, split in sources(cell)
    }
    for source, split in distinct.values():
        source.drawn(split)


def sources(cell: Experiment) -> Iterator[tuple[Dataset, Literal["train", "test"]]]:
    """Data sets beside the one to train on, each with the split that is used."""
    if cell.align:
        yield cell.align.data, "train"
    if cell.safety:
        yield cell.safety.harmful, "test"
        if cell.safety.allowed:
            yield cell.safety.allowed, "test"
        if any(defense.needs_harm for defense in cell.defense):
            yield cell.safety.known, "train"
    for ask in (ask for metric in cell.metrics for ask in metric.asks()):
        if ask.texts:
            yield ask.texts, "test"
