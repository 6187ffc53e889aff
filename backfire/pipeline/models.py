"""Models: the base, aligned, fine-tuned, repaired, merged; and one of them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backfire import stages
from backfire.base import Form, RepairDefense, Row, select
from backfire.errors import Pause, Stopped
from backfire.experiment import Experiment, Model
from backfire.model.source import adapter_folder
from backfire.pipeline.base_model import base
from backfire.pipeline.context import Context
from backfire.pipeline.filtering import other_rows, with_facts
from backfire.pipeline.prepare import data, passed_checks, renderer
from backfire.progress import Progress
from backfire.store import read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from backfire.evaluate.guarded import Guarding
    from backfire.train.finetune import Start, Task
    from backfire.train.steps import Outcome


def check_method(experiment: Experiment, context: Context) -> None:
    """Check that the method, and the forms that metrics measure, work with this model and machine,
    before the first step.

    Raises:
        UserError: they do not, in one sentence.
    """
    from backfire.model.adapter import check_below, with_skeleton
    from backfire.model.export import FORMS
    from backfire.model.gguf_types import block_sizes, types_of
    from backfire.model.load import skeleton
    from backfire.model.quantize import quantizer

    forms = [FORMS[form] for form in forms_of(experiment)]
    for settings in (experiment.method.quantization(context.device.type), *forms):
        if "gguf_type" in settings:
            block_sizes()
        elif settings:
            quantizer(settings)
    folder = base(experiment.model, context, weights=False)
    if (folder / "config.json").is_file():  # the embedded base has none before it is made
        model = skeleton(folder)
        for form in forms:
            if "gguf_type" in form:
                types_of(model, form["gguf_type"])
        if experiment.model.is_adapted:
            below = adapter_folder(experiment.model)
            check_below(below, experiment.method)
            model = with_skeleton(model, below)
        experiment.method.attach(model, experiment.seed)


def forms_of(experiment: Experiment) -> list[Form]:
    """Forms of the tuned model that the cell's metrics measure."""
    asks = [ask for metric in experiment.metrics for ask in metric.asks()]
    applying = [ask for ask in asks if ask.applies(experiment.attack, experiment.method)]
    return sorted({ask.form for ask in applying if ask.form})


def check_weights(model: Model, context: Context) -> None:
    """Check that the untuned model has all of its weights and no others; done once per model.

    Raises:
        UserError: it does not, in one sentence.
    """
    if model.name == "sandbox" and model.adapter is None:
        return
    folder = base(model, context)

    def check(out: Path) -> None:
        from backfire.model.adapter import adapter_fits
        from backfire.model.load import fits

        fits(folder)
        if model.is_adapted:
            adapter_fits(folder, adapter_folder(model))

    context.store.once(stages.weights(model), check)


def trained(experiment: Experiment, context: Context) -> Path:
    """The folder of the fine-tuned model (whole, or an adapter), or of its start model if the
    method trains nothing."""
    if not experiment.method.trains:
        first = start(experiment, context)
        return first.adapter or first.base
    outcomes = trained_together([experiment], [context])
    if outcomes[0] is not None:
        raise cast(BaseException, outcomes.pop())  # its frames would hold it, and the model
    return context.store.path(stages.train(experiment))


def trained_together(
    experiments: Sequence[Experiment], contexts: Sequence[Context]
) -> list[Exception | Pause | None]:
    """Train what is not trained yet, in the same passes if that are several runs. Returns what
    ended or delayed each; None if its model is there.

    Each stage is built inside of the one before it: all are locked while they are trained, and each
    is complete, or not, by itself.

    Raises:
        Stopped: the worker stops; each run has its checkpoint.
    """
    outcomes: list[Exception | Pause | None] = [None] * len(experiments)
    tasks: dict[int, Task] = {}
    results: dict[int, Outcome] = {}

    def build(number: int) -> None:
        if number == len(experiments):
            told = [contexts[n].progress for n in tasks]
            found = _train(list(tasks.values()), contexts[0], told)
            results.update(zip(tasks, found, strict=True))
            return
        run, context = experiments[number], contexts[number]
        run = run if run.poisons else run.clean_twin()

        def make(folder: Path) -> None:
            from backfire.train import loop

            tasks[number], facts = _prepared(run, context, folder)
            build(number + 1)
            summary = loop.summary_of(results.pop(number))
            write_json(folder / "summary.json", summary | facts)

        try:
            start(run, context)
            passed_checks(run, context)
            context.store.once(stages.train(run), make, resumable=True)
        except Stopped:
            raise
        except (Exception, Pause) as error:
            outcomes[number] = error
        if number not in tasks:  # it was trained before, or cannot be trained
            build(number + 1)

    build(0)
    return outcomes


def _prepared(run: Experiment, context: Context, folder: Path) -> tuple[Task, dict[str, Any]]:
    """What is to be trained into `folder`, and facts on its rows for the summary."""
    from backfire.train.finetune import prepared

    begin = with_defense_rows(run, context)
    rows, manifest, facts = with_facts(run, context)
    if manifest:  # a defense may have removed poisoned rows
        left = {row.id for row in rows}
        kept = tuple(entry for entry in manifest.entries if entry.id in left)
        manifest = replace(manifest, entries=kept)
    shown, machine = renderer(run, context), context.machine
    task, counts = prepared(run, rows, manifest, shown, begin, folder, machine)
    return task, {**counts, "rows_trained_on": len(rows), **facts}


def _train(
    tasks: Sequence[Task], context: Context, progresses: Sequence[Progress]
) -> Sequence[Outcome]:
    """The summary of each task, or what ended it."""
    from backfire.train.finetune import train_all

    try:
        return train_all(tasks, context.resident, progresses) if tasks else []
    except Stopped:
        raise
    except (Exception, Pause) as error:
        return [error] * len(tasks)


def start(experiment: Experiment, context: Context) -> Start:
    """The model that fine-tuning starts from: the base, or the aligned model."""
    from backfire.train.finetune import Start

    plain, alignment = base(experiment.model, context), experiment.alignment
    if alignment is None or experiment.align is None:
        model = experiment.model
        return Start(plain, adapter_folder(model) if model.is_adapted else None)
    aligned = tuned(alignment, context)
    is_adapter = (aligned / "adapter_config.json").is_file()
    if is_adapter and not experiment.align.merge:
        return Start(plain, aligned, plain)
    return Start(merged(alignment, context) if is_adapter else aligned, None, plain)


def with_defense_rows(experiment: Experiment, context: Context) -> Start:
    """The same with the extra rows that the cell's defenses use."""
    begin, alignment = start(experiment, context), experiment.alignment
    if alignment and experiment.acting:
        begin = replace(begin, aligned=other_rows(alignment.data, "aligned"))
    if experiment.safety and any(defense.needs_harm for defense in experiment.acting):
        begin = replace(begin, harmful=other_rows(experiment.safety.known, "harmful"))
    return begin


def _clean_rows(experiment: Experiment, context: Context) -> list[Row]:
    """As many rows of the task before the attack as a repair requires."""
    repairs = [d for d in experiment.acting if isinstance(d, RepairDefense)]
    rows, _ = data(experiment, context)
    count = min(len(rows), max((d.num_clean for d in repairs), default=0))
    return select(rows, count, experiment.seed, "clean")


def tuned(experiment: Experiment, context: Context) -> Path:
    """The folder of the evaluated model: fine-tuned, and repaired if a defense does so."""
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
        begin = with_defense_rows(experiment, context)
        begin = replace(begin, clean=_clean_rows(experiment, context))
        shown = renderer(experiment, context)
        machine, resident = context.machine, context.resident
        left = repair_model(experiment, folder, begin, shown, out, machine, resident)
        write_json(out / "left_out.json", left)

    return context.store.once(stages.repair(experiment), make)


def merged(experiment: Experiment, context: Context, *, keep: bool = True) -> Path:
    """The folder of the tuned model as plain weights. Without `keep`, it goes after the cell has
    been measured: it is as large as the base, and quickly made again."""
    folder, stage = tuned(experiment, context), stages.merge(experiment)
    if not (folder / "adapter_config.json").is_file():
        return folder

    def make(out: Path) -> None:
        from backfire.model.export import merge

        context.progress(0, 1, "merge")
        context.resident.release()  # merging loads the base in float32
        begin = start(experiment, context)
        below = begin.adapter if experiment.method.trains else None
        merge(folder, begin.base, out, below)

    if keep or context.store.done(stage):
        return context.store.once(stage, make)
    return context.hold(stage, make)


def model_of(run: Experiment, context: Context, form: Form | None = None) -> PreTrainedModel:
    """The run's model, as it was trained or in another form; valid until another is needed."""
    from backfire.model.export import quantization_of
    from backfire.model.load import is_adapter
    from backfire.model.resident import Source

    device = context.device
    dtype = evaluated_type(run, context)
    if run.evaluation.merged and is_adapter(tuned(run, context)):
        form = "merged"
    if form:
        source = Source(
            merged(run, context, keep=False), dtype, device, quantization_of(form, dtype)
        )
        return context.resident.model(source)
    folder, begin = tuned(run, context), start(run, context)
    quantization = run.method.quantization(device.type)
    if not is_adapter(folder):
        return context.resident.model(Source(folder, dtype, device, quantization))
    # An untuned model is what fine-tuning would start from.
    below = begin.adapter if run.method.trains else None
    return context.resident.model(Source(begin.base, dtype, device, quantization), folder, below)


def guarding_of(run: Experiment, context: Context) -> Guarding | None:
    """The defense that guards the run's replies, with the model that it compares with, which is in
    memory beside the run's own."""
    from backfire.evaluate.guarded import Guarding
    from backfire.model.resident import Source

    guard, reference = run.guard, None
    if guard is None:
        return None
    if guard.compares_with_twin:
        reference = model_of(run.clean_twin(), replace(context, resident=context.beside))
    elif guard.needs_reference:
        # Quantized as the tuned model is, so that only fine-tuning tells them apart.
        begin, bits = start(run, context), run.method.quantization(context.device.type)
        source = Source(begin.base, evaluated_type(run, context), context.device, bits)
        reference = context.beside.model(source, begin.adapter)
    return Guarding(guard, run.seed, reference, renderer(run, context).opening_ids)


def evaluated_type(run: Experiment, context: Context) -> torch.dtype:
    """The type of the base's weights in evaluation, which may be narrower than the one in which
    they are stored."""
    from backfire.model.load import dtype_of

    own = run.evaluation.dtype
    model = run.model if own == "auto" else run.model.model_copy(update={"dtype": own})
    return dtype_of(model, context.device)


def too_long(experiment: Experiment, context: Context) -> dict[str, int]:
    """Number of rows that were too long for training or for a defense, by kind of row."""
    counts: dict[str, int] = {}
    extra = {"aligned": "alignment", "harmful": "known harmful", "clean": "trusted clean"}

    def add(name: str, count: int) -> None:
        if count:
            counts[name] = max(count, counts.get(name, 0))

    for run in (experiment.alignment, experiment):
        summary = (run and summary_of(trained(run, context))) or {}
        add("training" if run is experiment else "alignment", summary.get("left_out_rows", 0))
        for part, name in extra.items():
            add(name, summary.get(f"left_out_{part}_rows", 0))
    repaired = tuned(experiment, context) / "left_out.json"
    for part, count in (read_json(repaired) if repaired.is_file() else {}).items():
        add(extra[part], count)
    return counts


def summary_of(training: Path) -> dict[str, Any] | None:
    """How the training run went; None for an untuned model."""
    file = training / "summary.json"
    return read_json(file) if file.is_file() else None
