"""Models: the base, aligned, fine-tuned, repaired, merged; and one of them in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire.base import (
    DataDefense,
    Dataset,
    Form,
    RepairDefense,
    Row,
)
from backfire.experiment import MERGED, Experiment, Model, digest, slug
from backfire.model.source import base_key
from backfire.rng import stream
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.data.poison import Manifest
    from backfire.train.finetune import Start

from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.pipeline.prepare import passed_checks, poisoned, renderer


def check_method(cell: Experiment, context: Context) -> None:
    """Whether the method can be had on this model and machine, before any step is spent.

    Raises:
        UserError: it cannot, in one sentence.
    """
    from backfire.model.load import device_of, skeleton
    from backfire.model.quantize import quantizer

    if settings := cell.method.quantization(device_of(context.machine.device).type):
        quantizer(settings)
    folder = base(cell.model, context, weights=False)
    if (folder / "config.json").is_file():  # the embedded base has none before it is made
        cell.method.attach(skeleton(folder), cell.seed)


def check_weights(model: Model, context: Context) -> None:
    """Whether all weights of the untuned model are there, and no others; checked once.

    Raises:
        UserError: they are not, in one sentence.
    """

    def look(out: Path) -> None:
        from backfire.model.load import fits

        fits(folder)

    if model.name != "sandbox":
        folder = base(model, context)
        context.store.once("whole", slug(Path(model.name).name), base_key(model), look)


def trained(cell: Experiment, context: Context) -> Path:
    """The folder of the fine-tuned model (whole, or an adapter); what it would start from if the
    method tunes nothing."""
    first = start(cell, context)
    if not cell.method.trains:
        return first.adapter or first.base
    if not cell.poisons:
        cell = cell.clean_twin()
    passed_checks(cell, context)

    def make(folder: Path) -> None:
        from backfire.train.finetune import tune

        context._loaded = None  # what was evaluated before is not to stand beside what is trained
        begin = with_defense_rows(cell, context)
        rows, manifest = filtered(cell, context)
        if manifest:  # a defense may have taken some of it out
            left = {row.id for row in rows}
            kept = tuple(entry for entry in manifest.entries if entry.id in left)
            manifest = replace(manifest, entries=kept)
        summary = tune(
            cell,
            rows,
            manifest,
            renderer(cell, context),
            begin,
            folder,
            context.machine,
            context.progress,
        )
        write_json(folder / "summary.json", {**summary, "rows_trained_on": len(rows)})

    return context.store.once("train", cell.slug_of_training, cell.keys.train, make, resumable=True)


def filtered(cell: Experiment, context: Context) -> tuple[list[Row], Manifest | None]:
    """The rows that are trained on, after the defenses that change them; and what the attacker did,
    of which they may have taken out some."""
    rows, manifest = poisoned(cell, context)
    bad = frozenset(entry.id for entry in manifest.entries) if manifest else frozenset()
    for defense in cell.acting:
        if isinstance(defense, DataDefense):
            rng = stream(cell.seed, "defense", defense.name)
            aligned = _other_rows(cell.alignment.data, "aligned") if cell.alignment else []
            rows = defense.filter(rows, aligned, bad, rng)
    return rows, manifest


def start(cell: Experiment, context: Context) -> Start:
    """What fine-tuning starts from: the base, or the model that the alignment stage makes of it."""
    from backfire.train.finetune import Start

    plain, alignment = base(cell.model, context), cell.alignment
    if alignment is None or cell.align is None:
        return Start(plain)
    aligned = tuned(alignment, context)
    is_adapter = (aligned / "adapter_config.json").is_file()
    if is_adapter and not cell.align.merge:
        return Start(plain, aligned, plain)
    return Start(merged(alignment, context) if is_adapter else aligned, None, plain)


def with_defense_rows(cell: Experiment, context: Context) -> Start:
    """The same with the other rows that the cell's defenses use, if it has any."""
    begin, alignment = start(cell, context), cell.alignment
    if alignment and cell.acting:
        begin = replace(begin, aligned=_other_rows(alignment.data, "aligned"))
    if cell.safety and any(defense.needs_harm for defense in cell.acting):
        begin = replace(begin, harmful=_other_rows(cell.safety.known, "harmful"))
    return begin


def _other_rows(source: Dataset, name: str) -> list[Row]:
    """Training rows beside the user's; their ids say so, so that none is taken for the task's."""
    rows = source.drawn("train")
    return [replace(row, id=f"{name} {row.id}") for row in rows]


def tuned(cell: Experiment, context: Context) -> Path:
    """The folder of the model as it is used: fine-tuned, and repaired if a defense does so."""
    folder = trained(cell, context)
    if not cell.method.trains or not any(isinstance(d, RepairDefense) for d in cell.acting):
        return folder
    if not cell.poisons:
        cell = cell.clean_twin()

    def make(out: Path) -> None:
        from backfire.train.finetune import repair_model

        context.progress(0, 1, "repair")
        begin, asked = with_defense_rows(cell, context), renderer(cell, context)
        left = repair_model(cell, folder, begin, asked, out, context.machine)
        write_json(out / "left_out.json", left)

    return context.store.once("repair", cell.slug_of_training, cell.keys.tuned, make)


def merged(cell: Experiment, context: Context) -> Path:
    """The folder of the tuned model as plain weights."""
    folder = tuned(cell, context)
    if not (folder / "adapter_config.json").is_file():
        return folder
    begin = start(cell, context)

    def make(out: Path) -> None:
        from backfire.model.export import merge

        context.progress(0, 1, "merge")
        merge(folder, begin.base, out, begin.adapter)

    key = digest([cell.keys.tuned, *MERGED])
    return context.store.once("merge", cell.slug_of_training, key, make)


def model_of(run: Experiment, context: Context, form: Form | None = None) -> PreTrainedModel:
    """The run's model, as it was trained or in another form; kept until another is asked for."""
    from backfire.model.export import quantization_of
    from backfire.model.load import device_of, dtype_of, load_base, load_tuned

    key = f"{run.keys.tuned} {form}"
    if context._loaded is None or context._loaded[0] != key:
        folder = merged(run, context) if form else tuned(run, context)
        device = device_of(context.machine.device)
        context._loaded = None
        if form:
            dtype = dtype_of(run.model, device)
            model = load_base(folder, dtype, device, quantization_of(form, dtype))
            context._loaded = (key, model)
            return model
        begin = start(run, context)
        # An untuned model is what fine-tuning would start from.
        below = begin.adapter if run.method.trains else None
        model = load_tuned(
            folder,
            begin.base,
            dtype_of(run.model, device),
            device,
            run.method.quantization(device.type),
            below=below,
        )
        context._loaded = (key, model)
    return context._loaded[1]


def too_long(cell: Experiment, context: Context) -> dict[str, int]:
    """How many rows were too long to be trained on, or for a defense to use, by what they are."""
    found: dict[str, int] = {}
    for run in (cell.alignment, cell):
        summary = (run and summary_of(trained(run, context))) or {}
        own = "training" if run is cell else "alignment"
        names = {"": own, "aligned_": "alignment", "harmful_": "known harmful"}
        for part, name in names.items():
            if count := summary.get(f"left_out_{part}rows", 0):
                found[name] = max(count, found.get(name, 0))
    repaired = tuned(cell, context) / "left_out.json"
    for part, count in (read_json(repaired) if repaired.is_file() else {}).items():
        name = {"aligned": "alignment", "harmful": "known harmful"}[part]
        found[name] = max(count, found.get(name, 0))
    return found


def summary_of(training: Path) -> dict[str, Any] | None:
    """How the training run went; None for an untuned model."""
    file = training / "summary.json"
    return read_json(file) if file.is_file() else None
