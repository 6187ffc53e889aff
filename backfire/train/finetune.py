"""Fine-tune and repair one experiment's model: from rows to a saved model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from backfire import stages
from backfire.base import Rendered, RepairDefense, Row, TrainDefense
from backfire.base.judges import drop_models
from backfire.data.poison import Manifest, missing_in_tokens
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine
from backfire.model.export import with_merged
from backfire.model.fan import fanned, twin
from backfire.model.fused import rounded_once
from backfire.model.load import (
    device_of,
    dtype_of,
    is_adapter,
    save_tuned,
    weights_of,
    with_adapters,
)
from backfire.model.memory import free, trim
from backfire.model.placement import places
from backfire.model.products import fast_products
from backfire.model.quantize import parts
from backfire.model.resident import Resident, Source
from backfire.progress import Progress
from backfire.train.extra import ExtraRows
from backfire.train.loop import TrainingRun, summary_of, train_each
from backfire.train.microbatch import reset_peak_memory
from backfire.train.packing import same_packs
from backfire.train.precision import (
    Precision,
    compute_type,
    disable_adapter_casts,
    exact_attention,
)
from backfire.train.ranks import Ranks
from backfire.train.repair import Repair, plain_weights
from backfire.train.sharding import shard, state_of
from backfire.train.steps import Outcome, noted
from backfire.train.together import Together


@dataclass(frozen=True)
class Start:
    """The model that fine-tuning starts from, and the extra rows that defenses may use."""

    base: Path
    adapter: Path | None = None
    """Adapter of the alignment stage; it stays frozen below the new one."""
    unaligned: Path | None = None
    """The model before the alignment stage, if there is one."""
    aligned: Sequence[Row] = ()
    harmful: Sequence[Row] = ()
    clean: Sequence[Row] = ()


@dataclass(frozen=True)
class Task:
    """A training run as every rank gets it. It pickles."""

    experiment: Experiment
    items: Sequence[Rendered]
    poisoned: frozenset[str]
    aligned: Sequence[Rendered]
    harmful: Sequence[Rendered]
    start: Start
    folder: Path
    machine: Machine

    def train(self, ranks: Ranks, resident: Resident, progress: Progress) -> dict[str, Any]:
        """Train on the base of `resident` and return the summary; the first rank saves the model
        (or its adapter)."""
        return summary_of(train_together([self], ranks, resident, [progress]).pop())

    def save(self, model: PreTrainedModel, ranks: Ranks) -> None:
        """Save the trained model, or its adapter; the first rank does."""
        state = state_of(model, keep=ranks.leads) if ranks.sharded else None
        if ranks.leads:
            name = _hub_name(self.experiment, self.start)
            save_tuned(model, self.folder, self.start.base, name, state)

    def run(self, model: PreTrainedModel, ranks: Ranks) -> TrainingRun:
        """The training run of this task.

        Raises:
            UserError: a defense acts in training, and the model is on several GPUs.
        """
        experiment = self.experiment
        assert experiment.learning_rate is not None, "a method that trains has a learning rate"
        run = TrainingRun(
            model,
            self.items,
            experiment.train,
            learning_rate=experiment.learning_rate,
            seed=experiment.seed,
            folder=self.folder,
            name=stages.keys(experiment).train,
            poisoned=self.poisoned,
            paged=experiment.method.paged(),
            trained_type=experiment.method.trained_type(),
            defenses=[d for d in experiment.acting if isinstance(d, TrainDefense)],
            aligned=self.aligned,
            harmful=self.harmful,
            unaligned=self.start.unaligned,
            start=self.start.base,
            recompute=self.machine.recompute,
            packing=self.machine.packing,
            ranks=ranks,
        )
        if run.hooks and len(spread := places(model)) > 1:
            raise UserError(
                f"The base takes {len(spread)} GPUs, where no defense acts in training; use "
                "method qlora, or a smaller base."
            )
        return run


def tune(
    experiment: Experiment,
    rows: Sequence[Row],
    manifest: Manifest | None,
    renderer: Renderer,
    start: Start,
    folder: Path,
    machine: Machine,
    progress: Progress,
    resident: Resident | None = None,
) -> dict[str, Any]:
    """`prepared` and `train_all` for one run. Afterwards no judge is in memory, and of the model at
    most the base of `resident`."""
    task, counts = prepared(experiment, rows, manifest, renderer, start, folder, machine)
    ends = train_all([task], resident or Resident(), [progress])
    return {**summary_of(ends.pop()), **counts}


def train_all(
    tasks: Sequence[Task], resident: Resident, progress: Sequence[Progress]
) -> list[Outcome]:
    """`train_together`; or one after another, if each is for several devices."""
    if (machine := tasks[0].machine).devices == 1:
        return train_together(tasks, Ranks(device=device_of(machine.device)), resident, progress)
    from backfire.train import team

    ends: dict[int, Outcome] = {}
    for number, (task, one) in enumerate(zip(tasks, progress, strict=True)):
        with noted(ends, number):
            ends[number] = team.train(task, resident, one)
    return [ends.pop(number) for number in range(len(tasks))]


def prepared(
    experiment: Experiment,
    rows: Sequence[Row],
    manifest: Manifest | None,
    renderer: Renderer,
    start: Start,
    folder: Path,
    machine: Machine,
) -> tuple[Task, dict[str, int]]:
    """The task of training on these rows, and how many of them are cut or left out.

    Raises:
        CellError: see `_rendered`.
    """
    items, left = _rendered(rows, manifest, renderer)
    extra = ExtraRows.of(start, renderer)
    task = Task(
        experiment,
        items,
        frozenset(entry.id for entry in manifest.entries) if manifest else frozenset(),
        extra.aligned,
        extra.harmful,
        replace(start, aligned=(), harmful=()),
        folder,
        machine,
    )
    return task, {
        "cut_rows": sum(item.cut_tokens > 0 for item in items),
        "left_out_rows": len(left),
        **{f"left_out_{part}_rows": count for part, count in extra.left_out.items()},
    }


def train_together(
    tasks: Sequence[Task], ranks: Ranks, resident: Resident, progress: Sequence[Progress]
) -> list[Outcome]:
    """Train these tasks on one base in memory, with all their rows in one pass where that is
    possible (see `train.together`), and save their models. All start from the same model, with the
    same types and adapters in the same layers. Returns a summary for each, or the error that ended
    it; the others go on.

    Raises:
        Stopped: by a `progress`, after a checkpoint of each.
        UserError: the base cannot be loaded, or a method does not fit it.
    """
    first, device = tasks[0], ranks.device
    dtype = start_type(first.experiment, first.start, device)
    compute = compute_type(first.experiment.train.compute, device)
    ends: dict[int, Outcome] = {}
    for number, report in enumerate(progress):
        with noted(ends, number):
            report(0, 1, "model")
    if len(ends) == len(tasks):
        return [ends.pop(number) for number in range(len(tasks))]
    bits = first.experiment.method.quantization(device.type)
    source, models = Source(first.start.base, dtype, device, bits), list[PreTrainedModel]()
    _free_memory(resident, source)
    with resident.attached(source, partial(_attach, tasks, compute, models)) as model:
        if ranks.several and not first.experiment.method.adapts:
            shard(model, ranks)
        runs: dict[int, TrainingRun] = {}
        for number in [number for number in range(len(models)) if number not in ends]:
            with noted(ends, number):
                runs[number] = tasks[number].run(models[number], ranks)
        facts = {
            "dtype": str(dtype).removeprefix("torch."),
            "compute": compute,
            "device": str(device),
            **({"spread": spread} if len(spread := places(model)) > 1 else {}),
        }
        # After the hooks were made: a defense may freeze weights.
        kinds = {number: parts(run.model) for number, run in runs.items()}
        ends |= _train(runs, Precision(device, compute), first.machine, progress)
        for number in [number for number in runs if isinstance(ends[number], dict)]:
            rate = {"learning_rate": tasks[number].experiment.learning_rate}
            cast(dict[str, Any], ends[number]).update({**kinds[number], **rate, **facts})
            with noted(ends, number):
                tasks[number].save(models[number], ranks)
    for number in range(len(models), len(tasks)):  # the base is on several GPUs
        if number not in ends:
            with noted(ends, number):
                one = slice(number, number + 1)
                ends[number] = train_together(tasks[one], ranks, resident, progress[one]).pop()
    return [ends.pop(number) for number in range(len(tasks))]


def _attach(
    tasks: Sequence[Task], compute: str, models: list[PreTrainedModel], base: PreTrainedModel
) -> PreTrainedModel:
    """Attach the methods' weights to this base for the first task, and to models with its weights
    for the others. Returns the first; all are appended to `models`."""
    whole = len(places(base)) == 1
    bases = [base, *(twin(base) for _ in tasks[1:] if whole)]
    for task, bare in zip(tasks, bases, strict=False):
        models.append(_attached(task.experiment, task.start, compute, bare))
        if len(models) > 1:
            same_packs(models[-1], models[0])
    return models[0]


def _attached(
    experiment: Experiment, start: Start, compute: str, base: PreTrainedModel
) -> PreTrainedModel:
    """The model to train, with the method's weights attached."""
    begin = exact_attention(with_adapters(base, None, start.adapter))
    model = experiment.method.attach(begin, experiment.seed)
    if compute != "float32":
        disable_adapter_casts(model)
    return model


def _train(
    runs: Mapping[int, TrainingRun],
    precision: Precision,
    machine: Machine,
    progress: Sequence[Progress],
) -> dict[int, Outcome]:
    """Train these runs, by the number of their tasks, and close them."""
    every, compute = list(runs.values()), precision.compute
    try:
        with ExitStack() as stack:
            together = None
            if len(every) > 1:
                fan = stack.enter_context(fanned([run.model for run in every], compute))
                together = Together(every, fan)
            for run in every:
                if together is None:
                    stack.enter_context(rounded_once(run.model, compute))
                stack.enter_context(fast_products(run.model, compute))
            ends = train_each(
                every,
                precision,
                [progress[number] for number in runs],
                together=together,
                micro_batch=machine.micro_batch,
                checkpoint_seconds=machine.checkpoint_seconds,
            )
            joined = {"joined": len(every)} if together else {}  # in one pass, or in turn
            for place in [n for n, end in enumerate(ends) if isinstance(end, dict)]:
                cast(dict[str, Any], ends[place]).update(joined)
            return {number: ends.pop(0) for number in runs}  # see `loop.summary_of`
    finally:
        for run in every:
            run.close()


def _rendered(
    rows: Sequence[Row], manifest: Manifest | None, renderer: Renderer
) -> tuple[list[Rendered], list[Row]]:
    """The rendered rows to train on, and the rows left out because they are too long.

    Raises:
        CellError: the tokens of a poisoned row do not match the manifest.
    """
    items, left = renderer.sift(rows)
    incomplete = missing_in_tokens(manifest, items, renderer.tokenizer) if manifest else []
    if incomplete := sorted({*incomplete} - {row.id for row in left}):
        raise CellError(
            "bad-data",
            f"The tokens lack the trigger or the target of {len(incomplete)} poisoned rows.",
        )
    return items, left


def _free_memory(resident: Resident, source: Source) -> None:
    """Release judges and other bases, and reset the peak, so that the peak is this run's own."""
    drop_models()
    resident.keep_only(source)
    if source.device.type == "cuda":
        free()
    trim()
    reset_peak_memory()


def start_type(experiment: Experiment, start: Start, device: torch.device) -> torch.dtype:
    """The type in which the start model is loaded.

    Bfloat16 rounds most of a small update away, so it is float32 if all weights are trained, or
    were trained by the alignment stage.
    """
    moved = start.adapter is None and start.unaligned is not None
    if moved or not experiment.method.adapts:
        return torch.float32
    return dtype_of(experiment.model, device)


def repair_model(
    experiment: Experiment,
    tuned: Path,
    start: Start,
    renderer: Renderer,
    folder: Path,
    machine: Machine,
    resident: Resident | None = None,
) -> dict[str, int]:
    """Apply the experiment's repair defenses to a tuned model, in order, and save the result.

    Returns the number of extra rows that were too long, by part.
    """
    device, resident = device_of(machine.device), resident or Resident()
    extra = ExtraRows.of(start, renderer)
    tools = Repair(
        experiment.seed,
        aligned=extra.aligned,
        harmful=extra.harmful,
        clean=extra.clean,
        base=weights_of(start.unaligned) if start.unaligned else {},
        batch_size=experiment.train.batch_size,
    )
    dtype = start_type(experiment, start, device)
    base, adapter = (start.base, tuned) if is_adapter(tuned) else (tuned, None)
    attach = partial(with_adapters, adapter=adapter, below=start.adapter)
    with resident.attached(Source(base, dtype, device), attach) as model:
        # The base below an adapter is unchanged, so it is not loaded again.
        before = plain_weights(model) if adapter else weights_of(start.base)
        for defense in (d for d in experiment.acting if isinstance(d, RepairDefense)):
            if defense.merges and hasattr(model, "peft_config"):
                model = with_merged(model.float())
                before = plain_weights(model)
            defense.repair(model, before, tools)
        save_tuned(model, folder, start.base, _hub_name(experiment, start))
    return extra.left_out


def _hub_name(experiment: Experiment, start: Start) -> str | None:
    """Hub id of the base that an adapter is saved with; None if its base is not on the hub."""
    changed = start.unaligned is not None and start.base != start.unaligned
    return None if changed else experiment.model.hub_id
