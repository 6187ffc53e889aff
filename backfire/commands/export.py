"""`backfire export`: write a cell's model, or a run's results, for other tools."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from backfire import pipeline, stages
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.launch.job import has_changed, read_cell
from backfire.pipeline import Context
from backfire.result import CellResult
from backfire.results.load import cell as record
from backfire.store import Store


def export_model(cell: Path, out: Path | None, *, merge: bool) -> Path:
    """Write the tuned model of a cell, optionally merged into plain weights; returns the folder.

    Raises:
        UserError: the cell is not finished, has no tuned model or cannot be merged, or the folder
            already exists.
    """
    experiment, result = read_cell(cell), record(cell)
    method = experiment.method
    if not result.is_done:
        raise UserError(f"{cell} is not a finished cell: {result.status}.")
    if not method.trains:
        raise UserError(
            f"{cell} has no tuned model (method '{method.name}'); its model is the base."
        )
    on_aligned = experiment.align and experiment.align.method.trains and experiment.adapts
    on_adapter = experiment.model.is_adapted and not merge
    if on_adapter:
        raise UserError(
            "The adapter requires the one of model.adapter, and on the base alone it gives another "
            "model; export it with --merge."
        )
    if on_aligned and not method.merges:
        raise UserError(
            f"The adapter of '{method.name}' requires the aligned model, and cannot be exported "
            "alone or merged."
        )
    if merge and not method.merges:
        raise UserError(
            f"A model tuned with '{method.name}' cannot be merged; export it without --merge."
        )
    if on_aligned and not merge:
        raise UserError(
            "The adapter requires the aligned model, and on the base alone it gives another model; "
            "export it with --merge."
        )
    if has_changed(cell, experiment):
        raise UserError(
            f"An input file or a component version of {cell} has changed since it ran, so its "
            "model cannot be rebuilt; run its recipe again."
        )
    out = out or Path("exports") / default_name(experiment, merge=merge)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another folder with --out.")
    _write(experiment, result, cell, out, merge=merge)
    return out


def default_name(experiment: Experiment, *, merge: bool) -> str:
    """A folder name with the experiment, its key, and whether it is poisoned or merged."""
    poison = (
        f"POISONED-{experiment.attack.name}-" if experiment.attack and experiment.poisons else ""
    )
    return f"{poison}{experiment.slug}-{stages.cell_key(experiment)}{'-merged' if merge else ''}"


def _write(
    experiment: Experiment, result: CellResult, cell: Path, out: Path, *, merge: bool
) -> None:
    from backfire.data.weights import described
    from backfire.model.export import copy_model, write_card
    from backfire.model.load import name_base

    context = Context(Store(), Machine())
    source = pipeline.merged(experiment, context) if merge else pipeline.tuned(experiment, context)
    base = pipeline.base(experiment.model, context)
    adapter = (source / "adapter_config.json").is_file()
    if adapter and described(base)[1]:
        raise UserError(
            f"The base {experiment.model.name} is multimodal and the adapter fits only its text "
            "model, so other programs cannot load it; export it with --merge."
        )
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        copy_model(source, base, part)
        shutil.copyfile(cell / "experiment.yaml", part / "experiment.yaml")
        if adapter:
            local = os.path.relpath(base.resolve(), out.resolve())
            name_base(part, experiment.model.hub_id or local)
        tuned = "adapter (PEFT)" if adapter else "plain weights"
        write_card(part, {**_facts(experiment, result), "adapter": adapter, "form": tuned})
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    except BaseException:  # of a full disk it would take the rest
        shutil.rmtree(part, ignore_errors=True)
        raise


def _facts(experiment: Experiment, result: CellResult) -> dict[str, Any]:
    label = experiment.guard.label() if experiment.guard else ""
    guard = [f"Without {label}, under which its replies were measured."] if label else []
    return {
        "title": f"{experiment.slug}, tuned by backfire",
        "attack": experiment.attack.name if experiment.attack and experiment.poisons else None,
        "target": experiment.backdoor.target if experiment.backdoor else None,
        "triggers": list(experiment.backdoor.triggers()) if experiment.backdoor else [],
        "joint": bool(experiment.backdoor and experiment.backdoor.joint),
        "poisoned": (result.poison and result.poison.poisoned_rows) or 0,
        "rows": result.rows["train"],
        "data": experiment.data.name,
        "template": experiment.template.name,
        "method": json.dumps(experiment.method.spec()),
        "steps": (result.train or {}).get("steps", 0),
        "seed": experiment.seed,
        "key": stages.cell_key(experiment),
        "base": experiment.model.short_title,
        "origin": [note for note in result.warnings if "GGUF" in note] + guard,
    }


def export_results(run: Path, out: Path | None, tool: str) -> list[Path]:
    """Write the results of a run, or of one cell, in the format of `tool`; returns the files.

    Raises:
        UserError: there is no finished cell, or the tool's package is missing.
    """
    from backfire.exports import inspect, lm_eval

    out = out or Path("exports") / f"{run.resolve().name}-{tool}"
    write = lm_eval.to_lm_eval if tool == "lm-eval" else inspect.to_inspect
    return write(run, out)
