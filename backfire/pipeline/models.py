"""Model stages: aligned, fine-tuned, repaired and merged models; one of them in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire import stages
from backfire.base import DataDefense, Dataset, Form, RepairDefense, Row
from backfire.experiment import Experiment, Model
from backfire.rng import stream
from backfire.stages import keys
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.data.poison import Manifest
    from backfire.train.finetune import Start

from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.pipeline.prepare import passed_checks, poisoned, renderer


def check_method(experiment: Experiment, context: Context) -> None:
    """Check that the method works with this model and machine, before any training step.

    Raises:
        UserError: it does not.
    """
    from backfire.model.load import device_of, skeleton
    from backfire.model.quantize import quantizer

    if settings := experiment.method.quantization(device_of(context.machine.device).type):
        quantizer(settings)
    folder = base(experiment.model, context, weights=False)
    if (folder / "config.json").is_file():  # the embedded base has none before it is made
        experiment.method.attach(skeleton(folder), experiment.seed)


def check_weights(model: Model, context: Context) -> None:
    """Check that the untuned model has exactly the weights it needs; done once.

    Raises:
        UserError: it does not.
    """

    def check(out: Path) -> None:
        from backfire.model.load import fits

        fits(folder)

    if model.name != "sandbox":
        folder = base(model, context)
        context.store.once(stages.weights(model), check)


def trained(experiment: Experiment, context: Context) -> Path:
    """The folder of the fine-tuned model (whole, or an adapter), or of its start if the method does
    not train."""
    first = start(experiment, context)
    if not experiment.method.trains:
        return first.adapter or first.base
    if not experiment.poisons:
        experiment = experiment.clean_twin()
    passed_checks(experiment, context)

    def make(folder: Path) -> None:
        from backfire.train.finetune import tune

        context._loaded = None  # free the evaluated model before training
        begin = with_defense_rows(experiment, context)
        rows, manifest = filtered(experiment, context)
        if manifest:  # a defense may have removed some of the poison
            left = {row.id for row in rows}
            kept = tuple(entry for entry in manifest.entries if entry.id in left)
            manifest = replace(manifest, entries=kept)
        summary = tune(
            experiment,
            rows,
            manifest,
            renderer(experiment, context),
            begin,
            folder,
            context.machine,
            context.progress,
        )
        write_json(folder / "summary.json", {**summary, "rows_trained_on": len(rows)})

    return context.store.once(stages.train(experiment), make, resumable=True)


def filtered(experiment: Experiment, context: Context) -> tuple[list[Row], Manifest | None]:
    """The training rows after the defenses that filter them; and the poison manifest, some of whose
    rows they may have removed."""
    rows, manifest = poisoned(experiment, context)
    bad = frozenset(entry.id for entry in manifest.entries) if manifest else frozenset()
    for defense in experiment.acting:
        if isinstance(defense, DataDefense):
            rng = stream(experiment.seed, "defense", defense.name)
            aligned = (
                _other_rows(experiment.alignment.data, "aligned") if experiment.alignment else []
            )
            rows = defense.filter(rows, aligned, bad, rng)
    return rows, manifest


def start(experiment: Experiment, context: Context) -> Start:
    """The start of fine-tuning: the base, or the model from the alignment stage."""
    from backfire.train.finetune import Start

    plain, alignment = base(experiment.model, context), experiment.alignment
    if alignment is None or experiment.align is None:
        return Start(plain)
    aligned = tuned(alignment, context)
    is_adapter = (aligned / "adapter_config.json").is_file()
    if is_adapter and not experiment.align.merge:
        return Start(plain, aligned, plain)
    return Start(merged(alignment, context) if is_adapter else aligned, None, plain)


def with_defense_rows(experiment: Experiment, context: Context) -> Start:
    """The start with the other rows that the cell's defenses use, if any."""
    begin, alignment = start(experiment, context), experiment.alignment
    if alignment and experiment.acting:
        begin = replace(begin, aligned=_other_rows(alignment.data, "aligned"))
    if experiment.safety and any(defense.needs_harm for defense in experiment.acting):
        begin = replace(begin, harmful=_other_rows(experiment.safety.known, "harmful"))
    return begin


def _other_rows(source: Dataset, name: str) -> list[Row]:
    """Training rows that are not the user's, with `name` in front of their ids."""
    rows = source.drawn("train")
    return [replace(row, id=f"{name} {row.id}") for row in rows]


def tuned(experiment: Experiment, context: Context) -> Path:
    """The folder of the final model: fine-tuned, and repaired if a defense does so."""
    folder = trained(experiment, context)
    if not experiment.method.trains or not any(
        isinstance(d, RepairDefense) for d in experiment.acting
    ):
        return folder
    if not experiment.poisons:
        experiment = experiment.clean_twin()

    def make(out: Path) -> None:
        from backfire.train.finetune import repair_model

        context.progress(0, 1, "repair")
        begin, render = with_defense_rows(experiment, context), renderer(experiment, context)
        left = repair_model(experiment, folder, begin, render, out, context.machine)
        write_json(out / "left_out.json", left)

    return context.store.once(stages.repair(experiment), make)


def merged(experiment: Experiment, context: Context) -> Path:
    """The folder of the tuned model as plain weights."""
    folder = tuned(experiment, context)
    if not (folder / "adapter_config.json").is_file():
        return folder
    begin = start(experiment, context)

    def make(out: Path) -> None:
        from backfire.model.export import merge

        context.progress(0, 1, "merge")
        merge(folder, begin.base, out, begin.adapter)

    return context.store.once(stages.merge(experiment), make)


def model_of(run: Experiment, context: Context, form: Form | None = None) -> PreTrainedModel:
    """The run's model, as trained or in another form; it stays loaded until another is needed."""
    from backfire.model.export import quantization_of
    from backfire.model.load import device_of, dtype_of, load_base, load_tuned

    key = f"{keys(run).tuned} {form}"
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
        # An untuned model is already the adapter that fine-tuning would start from.
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


def too_long(experiment: Experiment, context: Context) -> dict[str, int]:
    """Number of rows too long for training or for a defense, by kind of row."""
    counts: dict[str, int] = {}
    for run in (experiment.alignment, experiment):
        summary = (run and summary_of(trained(run, context))) or {}
        own = "training" if run is experiment else "alignment"
        names = {"": own, "aligned_": "alignment", "harmful_": "known harmful"}
        for part, name in names.items():
            if count := summary.get(f"left_out_{part}rows", 0):
                counts[name] = max(count, counts.get(name, 0))
    repaired = tuned(experiment, context) / "left_out.json"
    for part, count in (read_json(repaired) if repaired.is_file() else {}).items():
        name = {"aligned": "alignment", "harmful": "known harmful"}[part]
        counts[name] = max(count, counts.get(name, 0))
    return counts


def summary_of(training: Path) -> dict[str, Any] | None:
    """The summary of the training run; None for an untuned model."""
    file = training / "summary.json"
    return read_json(file) if file.is_file() else None
