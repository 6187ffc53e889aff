"""The training rows after the defenses that change them, and what a cell's base says of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire import stages
from backfire.base import DataDefense, Dataset, Finding, Look, ModelScanner, Row
from backfire.errors import CellError
from backfire.experiment import Experiment
from backfire.model.count import num_weights
from backfire.model.source import adapter_folder
from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.pipeline.prepare import drawn, poisoned, renderer
from backfire.rng import stream
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    from backfire.data.poison import Manifest


def filtered(experiment: Experiment, context: Context) -> tuple[list[Row], Manifest | None]:
    """The training rows after the defenses that change them, and the attacker's manifest, which
    may list rows that a defense removed."""
    return with_facts(experiment, context)[:2]


def with_facts(
    experiment: Experiment, context: Context
) -> tuple[list[Row], Manifest | None, dict[str, Any]]:
    """The same, and what each of these defenses measures in the rows that it gets."""
    rows, manifest = poisoned(experiment, context)
    bad = frozenset(entry.id for entry in manifest.entries) if manifest else frozenset()
    facts: dict[str, Any] = {}
    for defense in _defenses(experiment, context):
        rng = stream(experiment.seed, "defense", defense.name)
        alignment = experiment.alignment
        aligned = other_rows(alignment.data, "aligned") if alignment else []
        left = defense.filter(rows, aligned, bad, rng)
        if not left:
            raise CellError("bad-data", f"{defense.label()} removes every training row.")
        facts |= defense.facts(rows, bad)
        rows = left
    return rows, manifest, facts


def _defenses(experiment: Experiment, context: Context) -> list[DataDefense]:
    look = looking(experiment, context)
    return [one.asking(look) for one in experiment.acting if isinstance(one, DataDefense)]


def other_rows(source: Dataset, name: str) -> list[Row]:
    """Training rows of another source; the prefix keeps their ids apart from the task's."""
    return [replace(row, id=f"{name} {row.id}") for row in drawn(source, "train")]


def looking(experiment: Experiment, context: Context) -> Look:
    """How the cell's base, before any alignment, is asked about rows; each answer is kept."""

    def look(scanner: ModelScanner, rows: Sequence[Row]) -> list[Finding]:
        def make(folder: Path) -> None:
            from backfire.evaluate import reference
            from backfire.model.load import dtype_of
            from backfire.model.resident import Source

            context.progress(0, 1, f"scanner {scanner.name}")
            model, device = experiment.model, context.device
            asked = reference.Reference(
                Source(base(model, context), dtype_of(model, device), device),
                renderer(experiment, context),
                num_weights(model),
                adapter_folder(model) if model.is_adapted else None,
                context.resident,
            )
            found = reference.look(scanner, rows, asked)
            write_json(folder / "findings.json", [asdict(one) for one in found])

        folder = context.store.once(stages.scanned(experiment, scanner, rows), make)
        kept = read_json(folder / "findings.json")
        return [Finding(**{**one, "marks": tuple(one["marks"])}) for one in kept]

    return look
