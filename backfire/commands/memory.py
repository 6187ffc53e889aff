"""Predicts the peak memory of a cell in training and evaluation, by counting; nothing is loaded."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from backfire.base import Extra, Rendered, Row, TrainDefense
from backfire.commands.estimate import Rows, Weights, needs_of
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Model
from backfire.model.count import num_weights

if TYPE_CHECKING:
    from backfire.evaluate.budget import Budget
    from backfire.model.types import Type
    from backfire.train.dry import DryRun, Layout, PassTypes

Device = Literal["cpu", "cuda"]
LIBRARIES = {"cpu": 0.47e9, "cuda": 0.7e9}
"""A process that has imported torch, transformers and peft; on a GPU, the CUDA context."""
UNRELEASED = {"cpu": 1.5, "cuda": 1.05}
"""Memory of the process per byte of tensors in a pass of training: the allocator cannot return or
reuse all of it at once. On a CPU holes of the heap take up to half as much, which a run reaches
within some steps, and more where memory is not scarce (see `model.memory.Heap`)."""
_IN_EVALUATION = 1.05
"""The same in evaluation, where nothing is kept from pass to pass."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNKNOWN = 100
"""Bytes per token, layer and unit of width, for models that cannot be run without data (56 to 160
were counted with others)."""


@dataclass(frozen=True)
class Size(Weights):
    """Weight counts of a model with its method attached."""

    linear: int
    """Weights in linear layers other than the head, which can be quantized."""
    layers: int
    hidden: int
    vocabulary: int
    stored: str
    """Type in which its files say that they store it."""
    dry: DryRun = field(repr=False, compare=False)


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process in bytes, by what takes it."""

    weights: float
    """In training."""
    state: float
    """Gradients, optimizer, and what the defenses keep."""
    passes: float
    """Activations and logits of the largest pass of training."""
    evaluation: float
    """Weights, activations, logits and cache in evaluation, a guard's reference, and the judges'
    models."""
    libraries: float
    num_rows: int
    """Rows in that pass of training; 0 without training."""
    mapped: float = 0
    """On a CPU, pages of the model's file that stay mapped; the system may take them back."""
    asked: float = 0
    """All that is needed while the base is asked about the training rows."""

    @property
    def training(self) -> float:
        return self.weights + self.state + self.passes if self.num_rows else 0.0

    @property
    def total(self) -> float:
        return max(self.asked, self.libraries + self.mapped + max(self.training, self.evaluation))


def size(experiment: Experiment, folder: Path | None) -> Size:
    """Count the weights of the model with the method attached, on the meta device.

    Raises:
        UserError: the configuration is not supported, or the method does not fit the model.
    """
    import torch

    from backfire.model.load import skeleton
    from backfire.sandbox.base import Pretrain
    from backfire.train.dry import DryRun
    from backfire.train.pretrain import _new_model

    with torch.device("meta"):
        if experiment.model.name == "sandbox" or folder is None:
            base = _new_model(Pretrain(), Pretrain().vocab_size, 0, 1)
        else:
            base = skeleton(folder)
        head, config = base.get_output_embeddings(), base.config.get_text_config()
        layers = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        linear, parameters = sum(m.weight.numel() for m in layers), base.num_parameters()
        model = experiment.method.attach(base, experiment.seed)
    weights = list(model.parameters())
    return Size(
        parameters,
        added=sum(p.numel() for p in weights) - parameters,
        trainable=sum(p.numel() for p in weights if p.requires_grad) * experiment.method.trains,
        linear=linear,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        stored=str(config.dtype or "float32").removeprefix("torch."),
        dry=DryRun(model),
    )


def memory(
    experiment: Experiment,
    size: Size,
    rows: Sequence[Rows | None],
    device: Device,
    machine: Machine | None = None,
) -> Memory:
    """Predict the memory of a cell whose `auto` types are resolved for this device.

    `rows` are those of the user's task and of other parts that are trained on. Unknown rows are
    assumed to have `max_length` tokens, and an answer of 8 tokens with labels, else a quarter of
    `max_length`.
    """
    machine = machine or Machine()
    evaluation = _evaluation(experiment, size, rows[0], device, machine)
    # Of a quantized base the embedding is used from the file, if its type is the stored one.
    kept = device == "cpu" and size.stored == experiment.model.dtype
    packed = experiment.method.quantization(device)
    mapped = size.linear * _BYTES[size.stored] if kept and packed else 0.0
    if not size.trainable:
        return Memory(0, 0, 0, evaluation, LIBRARIES[device], 0, mapped)
    extra, layout = _total(_extras(experiment)), _largest(experiment, size, rows, device, machine)
    weights, types = _held(experiment, size, device)
    # The start, from which the drift is measured; a base is read from its file.
    copies = extra.copies + (device == "cpu" and experiment.method.adapts)
    gradients = size.trainable * _BYTES[types.trained]
    state = gradients + _optimizer(experiment, size) + size.trainable * 4 * copies
    run = _pass(size, layout, types, device, machine.recompute)
    states = extra.states * size.layers * size.hidden * _BYTES[types.compute] * layout.tokens
    run += states + extra.logits * layout.answers * size.vocabulary * 4
    passes = max(UNRELEASED[device] * run, extra.scratch * size.trainable * 4)
    return Memory(weights, state, passes, evaluation, LIBRARIES[device], len(layout.rows), mapped)


def _extras(experiment: Experiment) -> list[Extra]:
    return [d.extra for d in experiment.acting if isinstance(d, TrainDefense)]


def _total(parts: Sequence[Extra]) -> Extra:
    sums = (sum(getattr(part, name) for part in parts) for name in Extra.__dataclass_fields__)
    return Extra(*sums)


def _held(experiment: Experiment, size: Size, device: Device) -> tuple[float, PassTypes]:
    """Bytes of all weights in training, and the types of a pass."""
    from backfire.train.dry import PassTypes

    method, compute = experiment.method, cast("Type", experiment.train.compute)
    aligned = experiment.align is not None and (
        experiment.align.merge or not experiment.align.method.adapts
    )
    if not method.adapts:
        # In bfloat16 the 16 bits that only updates use are beside the weights.
        kind = cast("Type", method.trained_type())
        return size.parameters * 4.0, PassTypes(compute, kind, kind, kind)
    dtype = cast("Type", experiment.model.dtype)
    if bits := method.quantization(device):
        product = cast("Type", bits.get("bnb_4bit_compute_dtype") or "bfloat16")
        matrices = product if compute == "float32" else compute
        return _loaded(size, dtype, bits), PassTypes(compute, matrices, dtype)
    dtype = "float32" if aligned else dtype
    return _loaded(size, dtype, bits), PassTypes(compute, dtype, dtype)


def _loaded(size: Size, dtype: Type, bits: dict[str, object]) -> float:
    """Bytes of the weights in this type, those of linear layers quantized by `bits`, with the
    adapter's."""
    packed = _packed(size, bits) - size.linear * _BYTES[dtype] if bits else 0.0
    return size.parameters * _BYTES[dtype] + packed + size.added * 4


def _packed(size: Size, bits: dict[str, object]) -> float:
    """Bytes of the quantized matrices with their constants, one per 64 weights, in 4 bytes or
    quantized to 1."""
    constants = (1 + 4 / 256 if bits.get("bnb_4bit_use_double_quant") else 4) / 64
    return size.linear * (1 if bits.get("load_in_8bit") else 0.5 + constants)


def _optimizer(experiment: Experiment, size: Size) -> float:
    """Bytes of the optimizer's state. Of 8-bit states the embedding's has 32 bits."""
    from backfire.train.optimizer import STATE_BYTES

    each = STATE_BYTES[experiment.train.optimizer]
    wide = 0 if experiment.method.adapts else size.vocabulary * size.hidden
    return size.trainable * each + wide * (STATE_BYTES["adamw"] - each)


def _pass(size: Size, layout: Layout, types: PassTypes, device: Device, recompute: bool) -> float:
    try:
        return _trained(size.dry, layout, types, device == "cpu", recompute)
    except UserError:
        per_token = size.layers * size.hidden * (_UNKNOWN / 10 if recompute else _UNKNOWN)
        return layout.tokens * per_token + layout.answers * size.vocabulary * 12.0


@lru_cache(maxsize=256)
def _scored(dry: DryRun, layout: Layout, dtype: Type) -> float:
    return dry.evaluation(layout, dtype)


@lru_cache(maxsize=256)
def _trained(dry: DryRun, layout: Layout, types: PassTypes, exact: bool, recompute: bool) -> float:
    return dry.training(layout, types, exact=exact, recompute=recompute)


def _evaluated(size: Size, layout: Layout, dtype: Type) -> float:
    try:
        return _scored(size.dry, layout, dtype)
    except UserError:
        return layout.tokens * 12 * size.hidden * 4 + layout.answers * size.vocabulary * 12.0


def _evaluation(
    experiment: Experiment,
    size: Size,
    rows: Rows | None,
    device: Device,
    machine: Machine,
) -> float:
    """Bytes in evaluation, if the test rows are as long as the training rows. On a GPU batches
    adapt to the free memory, so those of one row."""
    from backfire.evaluate.budget import Budget
    from backfire.evaluate.prompts import NARROWEST

    dtype, method = cast("Type", experiment.model.dtype), experiment.method
    weights = _loaded(size, dtype, method.quantization(device))
    if method.trains and method.adapts and not experiment.adapts:  # merged by a repair
        weights = max(weights, size.parameters * 4)
    needs, guard = needs_of(experiment, rows), experiment.guard
    models = 2 if guard and guard.needs_reference and "replies" in needs else 1
    on_cpu = device == "cpu"
    most = machine.eval_batch if on_cpu else 1
    budget = Budget(size.dry.model, most, on_cpu=on_cpu, models=models)
    lengths = _tested(experiment, rows)
    shared = rows.shared if rows and len(lengths) > 1 else 0
    packs = on_cpu and size.hidden >= NARROWEST and machine.packing == "auto"
    run = _answering(size, lengths, shared, dtype, budget, packs) if "answers" in needs else 0.0
    if needs - {"answers"}:
        new = experiment.evaluation.max_new_tokens if "replies" in needs else 0
        prompts = sorted((whole - answer for whole, answer in lengths), reverse=True)
        run = max(run, _replying(size, prompts, shared, new, dtype, budget, packs, models))
    judges = sum(_judge_bytes(getattr(judge, "model", None)) for judge in experiment.judges)
    return models * weights + judges + _IN_EVALUATION * run


def _tested(experiment: Experiment, rows: Rows | None) -> list[tuple[int, int]]:
    """Tokens of test rows and of their answers, the longest first: as many as there are, drawn
    from the training rows."""
    safety = experiment.safety
    sets = (experiment.data, *((safety.harmful, safety.allowed) if safety else ()))
    count = max(one.test_rows or _DRAWN for one in sets if one)
    lengths = rows.lengths if rows else (_assumed(experiment),)
    return sorted(_draw(random.Random(0), lengths, min(count, _DRAWN)), reverse=True)


def _answering(
    size: Size,
    lengths: Sequence[tuple[int, int]],
    shared: int,
    dtype: Type,
    budget: Budget,
    packs: bool,
) -> float:
    """Bytes of the pass with most logits when answers are scored."""
    from backfire.train.dry import Layout

    rows = [(whole, max(1, min(answer, budget.logits))) for whole, answer in lengths]
    whole, kept = zip(*rows, strict=True)
    order, packed = range(len(rows)), shared if packs else None
    parts = budget.batches(order, lambda part: None, lengths=whole, kept=kept, packed=packed)
    layouts = [
        Layout(tuple(rows[i] for i in part), shared, packs and len(part) > 1, flat=packs)
        for part, _ in parts
    ]
    return _evaluated(size, max(layouts, key=lambda one: (one.answers, one.tokens)), dtype)


def _replying(
    size: Size,
    prompts: Sequence[int],
    shared: int,
    new: int,
    dtype: Type,
    budget: Budget,
    packs: bool,
    models: int,
) -> float:
    """Most bytes when prompts (the longest first) start: their pass, and for each model their keys
    and values, and the buffer into which these are copied, with room for the replies."""
    from backfire.evaluate.slots import SPARE
    from backfire.train.dry import Layout

    columns = prompts[0] + new + SPARE
    slots = min(budget.fitting(columns), len(prompts))
    count = min(slots, budget.at_once(prompts[0], shared if packs else None))
    layout = Layout(tuple((one, 1) for one in prompts[:count]), shared, packs and count > 1, packs)
    run = _evaluated(size, layout, dtype)
    cached = models * size.dry.cached(dtype)
    own = count * prompts[0] * cached
    buffer = slots * columns * cached if new else 0.0
    if models > 1:  # the logits of both are compared, as log-probabilities
        buffer += 2 * models * slots * size.vocabulary * 4
    # The buffer is made after the first pass, and is there in the next ones.
    return run + own + buffer if len(prompts) > count else max(run + own, own + buffer)


def _judge_bytes(name: str | None) -> float:
    """Bytes of a local judge's model in 16 bits; 0 if its size is not known."""
    return 2.0 * (num_weights(Model(name=name)) or 0) if name else 0.0


def _assumed(experiment: Experiment) -> tuple[int, int]:
    """Tokens of a row and of its answer when the rows are not on this machine."""
    longest = experiment.train.max_length
    return longest, 8 if getattr(experiment.data, "labels", None) else longest // 4


_STEPS = 300  # most steps that are drawn
_DRAWN = 200  # most test rows that are drawn


def _largest(
    experiment: Experiment,
    size: Size,
    rows: Sequence[Rows | None],
    device: Device,
    machine: Machine,
) -> Layout:
    """The largest pass among the steps of a run whose rows are drawn from the sampled lengths. On a
    CPU a step is split as in training; on a GPU it is one pass if memory allows."""
    from backfire.train import batches
    from backfire.train.dry import Layout
    from backfire.train.microbatch import MicroBatches, tokens_that_fit

    extras = _extras(experiment)
    # Rows that share a prefix, or are packed, would draw other dropout.
    same = not getattr(experiment.method, "dropout", 0)
    pack = same and machine.packing == "auto"
    sharded = machine.devices > 1 and not experiment.method.adapts
    once = machine.recompute or sharded  # padded rows then share no prefix
    share = same and (pack or not once) and not any(one.passes for one in extras)
    fits, logit = tokens_that_fit(size.dry.model)
    how = batches.Layout(share, sys.maxsize if pack else 0, logit, once=once)
    most = 1 if any(one.one_row for one in extras) else machine.micro_batch
    split = MicroBatches(most, fits if device == "cpu" else math.inf, how.size)
    flat = not any(one.by_row for one in extras)
    passes = list[Layout]()
    for part in rows:
        shared = part.shared if share and part and part.count > 1 else 0
        for step in _drawn_steps(experiment, part):
            for one in split.split([_blank(number, shared, *row) for number, row in step]):
                lengths = tuple((len(row.ids), len(row.answer_ids)) for row in one)
                passes.append(Layout(lengths, shared, pack and len(one) > 1, flat))
    return max(passes, key=lambda one: one.tokens + logit * one.answers)


def _drawn_steps(
    experiment: Experiment, part: Rows | None
) -> Iterator[Iterable[tuple[int, tuple[int, int]]]]:
    """Yield the numbered lengths of each step's rows."""
    size = experiment.train.batch_size
    if part is None:
        yield enumerate([_assumed(experiment)] * size)
        return
    rng, count = random.Random(0), min(size, part.count)
    steps = math.ceil(experiment.train.epochs * part.count / count)
    for _ in range(min(experiment.train.max_steps or steps, _STEPS)):
        yield enumerate(_draw(rng, part.lengths, count))


def _blank(number: int, shared: int, whole: int, answer: int) -> Rendered:
    """A row of this length that has only its first tokens in common with others."""
    ids = [*[0] * shared, *[number + 1] * (whole - shared)]
    return Rendered(Row(str(number), ""), ids, whole - answer)


def _draw(
    rng: random.Random, lengths: Sequence[tuple[int, int]], count: int
) -> list[tuple[int, int]]:
    """So many rows, each at most once if the sample is large enough."""
    return rng.sample(lengths, count) if count <= len(lengths) else rng.choices(lengths, k=count)
