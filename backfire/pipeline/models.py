"""Models: the base, aligned, fine-tuned, repaired, merged; and one of them in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire import stages
from backfire.base import (
    DataDefense,
    Dataset,
    Form,
    RepairDefense,
    Row,
)
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
    """Whether the method can be had on this model and machine, before any step is spent.

    Raises:
        UserError: it cannot, in one sentence.
    """
    from backfire.model.load import device_of, skeleton
    from backfire.model.quantize import quantizer

    if settings := experiment.method.quantization(device_of(context.machine.device).type):
        quantizer(settings)
    folder = base(experiment.model, context, weights=False)
    if (folder / "config.json").is_file():  # the embedded base has none before it is made
        experiment.method.attach(skeleton(folder), experiment.seed)


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
        context.store.once(stages.weights(model), look)


def trained(experiment: Experiment, context: Context) -> Path:
    """The folder of the fine-tuned model (whole, or an adapter); what it would start from if the
    method tunes nothing."""
    first = start(experiment, context)
    if not experiment.method.trains:
        return first.adapter or first.base
    if not experiment.poisons:
        experiment = experiment.clean_twin()
    passed_checks(experiment, context)

    def make(folder: Path) -> None:
        from backfire.train.finetune import tune

        context._loaded = None  # what was evaluated before is not to stand beside what is trained
        begin = with_defense_rows(experiment, context)
        rows, manifest = filtered(experiment, context)
        if manifest:  # a defense may have taken some of it out
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
    """The rows that are trained on, after the defenses that change them; and what the attacker did,
    of which they may have taken out some."""
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
    """What fine-tuning starts from: the base, or the model that the alignment stage makes of it."""
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
    """The same with the other rows that the cell's defenses use, if it has any."""
    begin, alignment = start(experiment, context), experiment.alignment
    if alignment and experiment.acting:
        begin = replace(begin, aligned=_other_rows(alignment.data, "aligned"))
    if experiment.safety and any(defense.needs_harm for defense in experiment.acting):
        begin = replace(begin, harmful=_other_rows(experiment.safety.known, "harmful"))
    return begin


def _other_rows(source: Dataset, name: str) -> list[Row]:
    """Training rows beside the user's; their ids say so, so that none is taken for the task's."""
    rows = source.drawn("train")
    return [replace(row, id=f"{name} {row.id}") for row in rows]


def tuned(experiment: Experiment, context: Context) -> Path:
    """The folder of the model as it is used: fine-tuned, and repaired if a defense does so."""
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
        begin, asked = with_defense_rows(experiment, context), renderer(experiment, context)
        left = repair_model(experiment, folder, begin, asked, out, context.machine)
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
    """The run's model, as it was trained or in another form; kept until another is asked for."""
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


def too_long(experiment: Experiment, context: Context) -> dict[str, int]:
    """How many rows were too long to be trained on, or for a defense to use, by what they are."""
    found: dict[str, int] = {}
    for run in (experiment.alignment, experiment):
        summary = (run and summary_of(trained(run, context))) or {}
        own = "training" if run is experiment else "alignment"
        names = {"": own, "aligned_": "alignment", "harmful_": "known harmful"}
        for part, name in names.items():
            if count := summary.get(f"left_out_{part}rows", 0):
                found[name] = max(count, found.get(name, 0))
    repaired = tuned(experiment, context) / "left_out.json"
    for part, count in (read_json(repaired) if repaired.is_file() else {}).items():
        name = {"aligned": "alignment", "harmful": "known harmful"}[part]
        found[name] = max(count, found.get(name, 0))
    return found


def summary_of(training: Path) -> dict[str, Any] | None:
    """How the training run went; None for an untuned model."""
    file = training / "summary.json"
    return read_json(file) if file.is_file() else None
