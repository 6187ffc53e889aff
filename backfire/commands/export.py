"""`backfire export`: a cell's model, or a run's results, for use elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from backfire import pipeline, stages
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.playground.models import read_cell
from backfire.result import CellResult
from backfire.results.load import cell as record
from backfire.store import Store


def export_model(cell: Path, out: Path | None, *, merge: bool) -> Path:
    """Write the tuned model of a cell, merged into plain weights if asked; returns the folder.

    Raises:
        UserError: no finished cell, nothing was tuned, the folder is taken, no way to merge.
    """
    one, result = read_cell(cell), record(cell)
    if not result.is_done:
        raise UserError(f"{cell} is no finished cell: {result.status}.")
    if not one.method.trains:
        raise UserError(
            f"{cell} tuned nothing (method '{one.method.name}'); its model is the base."
        )
    on_aligned = one.align and one.align.method.trains and one.method.adapts
    if on_aligned and not one.method.merges:
        raise UserError(
            f"What '{one.method.name}' leaves stands on an aligned model, and can neither be "
            "exported alone nor merged."
        )
    if merge and not one.method.merges:
        raise UserError(
            f"A model tuned by '{one.method.name}' cannot be merged; export it without --merge."
        )
    if on_aligned and not merge:
        raise UserError(
            "The user's adapter stands on an aligned model, so on the base alone it is another "
            "model; export it with --merge."
        )
    if result.keys.get("tuned", stages.keys(one).tuned) != stages.keys(one).tuned:
        raise UserError(
            f"A file or a version behind {cell} has changed since it was run, so its model cannot "
            "be had again; run its recipe anew."
        )
    out = out or Path("exports") / default_name(one, merge=merge)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another folder with --out.")
    _write(one, result, cell, out, merge=merge)
    return out


def default_name(cell: Experiment, *, merge: bool) -> str:
    """A folder name that says what was done to the model."""
    poison = f"POISONED-{cell.attack.name}-" if cell.attack and cell.poisons else ""
    return f"{poison}{cell.slug}-{stages.cell_key(cell)}{'-merged' if merge else ''}"


def _write(one: Experiment, result: CellResult, cell: Path, out: Path, *, merge: bool) -> None:
    from backfire.data.weights import described
    from backfire.model.export import copy_model, write_card
    from backfire.model.load import name_base

    context = Context(Store(), Machine())
    source = pipeline.merged(one, context) if merge else pipeline.tuned(one, context)
    base = pipeline.base(one.model, context)
    adapter = (source / "adapter_config.json").is_file()
    if adapter and described(base)[1]:
        raise UserError(
            f"The base {one.model.name} takes more than text, and the adapter was made on its text "
            "model alone, which no program finds in it; export it with --merge."
        )
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    copy_model(source, base, part)
    shutil.copyfile(cell / "experiment.yaml", part / "experiment.yaml")
    hub = None if one.model.is_folder or one.model.name == "sandbox" else one.model.name
    if adapter:
        name_base(part, hub or os.path.relpath(base.resolve(), out.resolve()))
    tuned = "adapter (PEFT)" if adapter else "plain weights"
    write_card(part, {**_facts(one, result), "adapter": adapter, "form": tuned})
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        out.rmdir()
    part.rename(out)


def _facts(one: Experiment, result: CellResult) -> dict[str, Any]:
    return {
        "title": f"{one.slug}, tuned by backfire",
        "attack": one.attack.name if one.attack and one.poisons else None,
        "target": one.backdoor.target if one.backdoor else None,
        "triggers": list(one.backdoor.triggers()) if one.backdoor else [],
        "poisoned": (result.poison and result.poison.poisoned_rows) or 0,
        "rows": result.rows["train"],
        "data": one.data.name,
        "template": one.template.name,
        "method": json.dumps(one.method.spec()),
        "steps": (result.train or {}).get("steps", 0),
        "seed": one.seed,
        "key": stages.cell_key(one),
        "base": one.model.name if not one.model.is_folder else Path(one.model.name).name,
    }


def export_results(run: Path, out: Path | None, tool: str) -> list[Path]:
    """Write the results of a run, or of one cell, as `lm-eval` or `inspect` would; the files.

    Raises:
        UserError: no finished cell, or the tool's package is missing.
    """
    from backfire.exports import inspect, lm_eval

    out = out or Path("exports") / f"{run.resolve().name}-{tool}"
    write = lm_eval.to_lm_eval if tool == "lm-eval" else inspect.to_inspect
    return write(run, out)
