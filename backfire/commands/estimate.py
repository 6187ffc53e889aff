"""Estimates of rows, tokens, time, disk and learning rates of a recipe, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backfire import plan, stages
from backfire.base import LARGE, Row, TrainDefense
from backfire.commands import asking
from backfire.data.jsonl import read_jsonl
from backfire.data.render import Renderer
from backfire.data.weights import is_bare, read_config
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Model
from backfire.hashes import file_hash
from backfire.model.count import num_weights, weights_in
from backfire.model.source import downloaded, local_gguf
from backfire.recipe import Recipe
from backfire.sandbox.base import Pretrain, shipped
from backfire.store import Store
from backfire.text import duration
from backfire.tokenizer import load_tokenizer

_SAMPLE = 200  # rows whose tokens are counted


@dataclass(frozen=True)
class Weights:
    """Number of weights in the base, added by the method, and trained."""

    parameters: int
    added: int
    trainable: int


@dataclass(frozen=True)
class Rows:
    """Number of training rows, and the tokens of a sample of them: of the row and of its answer."""

    count: int
    lengths: tuple[tuple[int, int], ...]
    shared: int = 0
    """Tokens at the start that all of them share."""
    labeled: bool | None = None
    """Whether the task has labels; None is unknown."""

    @property
    def tokens(self) -> float:
        """Mean tokens of a row."""
        return sum(whole for whole, _ in self.lengths) / len(self.lengths)

    @property
    def longest(self) -> int:
        return max(whole for whole, _ in self.lengths)

    @property
    def answer(self) -> int:
        """Tokens of the longest answer."""
        return max(answer for _, answer in self.lengths)


def method_key(experiment: Experiment) -> str:
    """Equal for experiments with the same model and method, except for the learning rate."""
    rest = {k: v for k, v in experiment.method.spec().items() if k != "learning_rate"}
    return str([experiment.model.spec(), rest])


def rows_key(experiment: Experiment) -> str:
    """Equal for experiments whose training rows are the same after rendering."""
    parts = (experiment.model, experiment.data, experiment.template)
    return str([*(part.spec() for part in parts), experiment.train.seen])


def rows_by_key(cells: Iterable[Experiment], store: Store) -> dict[str, Rows | None]:
    """`rows_of` by `rows_key`, each computed once."""
    distinct = {rows_key(experiment): experiment for experiment in cells}
    return {key: rows_of(experiment, store) for key, experiment in distinct.items()}


def model_folder(model: Model, store: Store) -> Path | None:
    """The local folder with the model's config.json or tokenizer, if any; nothing is downloaded."""
    if model.name == "sandbox":
        folder = shipped(stages.base().key) or store.path(stages.tokenizer())
        return folder if folder.is_dir() else None
    if model.is_gguf:
        return _converted(model, store)
    if model.is_local:
        return model.path
    return downloaded(model)


def _converted(model: Model, store: Store) -> Path | None:
    """The folder made from a GGUF file, if it was made."""
    file = local_gguf(model)
    stage = file and stages.gguf_config(file_hash(file))
    return store.path(stage) if stage and store.done(stage) else None


def rough_weights(experiment: Experiment, folder: Path | None) -> Weights | None:
    """Count weights from the file headers; an adapter's are estimated from its rank."""
    if experiment.model.name == "sandbox":
        width, count = Pretrain().hidden_size, num_weights(experiment.model)
    else:
        try:
            config = read_config(folder / "config.json") if folder else {}
            width = (config.get("text_config") or config).get("hidden_size", 0)
        except UserError:
            return None
        count = weights_in(folder) if folder and not experiment.model.is_gguf else None
        only_config = folder and not count and (experiment.model.hub_id or is_bare(folder))
        if experiment.model.is_gguf or only_config:
            count = num_weights(experiment.model)
    if not count or not width:
        return None
    if experiment.method.name == "full":
        return Weights(count, 0, count)
    added = min(count, round(count * 2 * getattr(experiment.method, "rank", 1) / width))
    return Weights(count, added, added)


def rows_of(experiment: Experiment, store: Store) -> Rows | None:
    """Count the tokens of a sample of the rows; None if the rows are not on this machine."""
    data = experiment.data
    if store.done(stages.data(experiment)):
        rows = read_jsonl(store.path(stages.data(experiment)) / "train.jsonl")
    elif getattr(data, "hub", None) and not getattr(data, "train", None):
        return None
    else:
        rows = data.drawn("train")
    sample = rows[:: math.ceil(len(rows) / _SAMPLE)]
    labeled = any(row.candidates for row in sample)
    folder, longest = model_folder(experiment.model, store), experiment.train.max_length
    if folder and any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")):
        try:
            items, _ = Renderer(
                experiment.template,
                load_tokenizer(folder),
                longest,
                on_long_row=experiment.train.on_long_row,
            ).sift(sample)
        except CellError:  # a row does not fit at all; `validate` names it
            return Rows(len(rows), ((longest, longest),), labeled=labeled)
        lengths = [(len(item.ids), len(item.answer_ids)) for item in items]
        shared = min(_alike([item.ids for item in items]), *(x.num_prompt - 1 for x in items))
    else:
        lengths, shared = [_without_tokenizer(experiment, row) for row in sample], 0
    whole = tuple((min(length, longest), answer) for length, answer in lengths)
    return Rows(len(rows), whole, max(0, shared), labeled)


def _alike(rows: Sequence[list[int]]) -> int:
    """Number of tokens at the start that are the same in all rows."""
    low, high = min(rows), max(rows)  # the rows in between cannot differ where these two agree
    pairs = enumerate(zip(low, high, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(low), len(high)))


def _without_tokenizer(experiment: Experiment, row: Row) -> tuple[int, int]:
    """Estimated tokens of the row and of its answer, at four characters per token."""
    try:
        prompt = experiment.template.prompt(row)
    except NotImplementedError:  # the tokenizer's own template
        prompt = "".join(message.content for message in row.messages)
    answer = 1 + math.ceil(len(row.answer) / 4)
    return 1 + len(prompt) // 4 + answer, answer


def tokens_of(run: Experiment, rows: Rows) -> float:
    """Number of tokens that a training run processes."""
    if run.train.max_steps:
        return run.train.max_steps * run.train.batch_size * rows.tokens
    return run.train.epochs * rows.count * rows.tokens


# ----------------------------------------------------------------------------- time and disk

ASSUMED = {"cpu": 5e10, "gpu": 1.5e14}
"""Assumed useful FLOP/s: one CPU core (57 to 115 billion were measured), a GPU's sixth of peak."""
_CHECKPOINTS, _STATE = 3, 12
"""Two are kept while the next is written; bytes per weight, with AdamW's two moments in float32."""


@dataclass(frozen=True)
class Cost:
    """Cost of the training runs that are not done yet; None is unknown."""

    runs: int
    tokens: float | None
    flops: float | None
    kept: float | None
    """Bytes of the saved models and adapters, in float32."""
    checkpoints: float | None
    """Additional bytes for the checkpoints of the largest run while it lasts."""


def runs_of(recipe: Recipe) -> list[Experiment]:
    """Every distinct training run: of the cells, their clean-model baselines and alignment
    stages."""
    return [job.experiment for job in plan.jobs(recipe.cells, recipe.axes) if job.kind == "train"]


def cost(
    recipe: Recipe,
    store: Store,
    rows: Mapping[str, Rows | None],
    weights: Mapping[str, Weights | None],
) -> Cost:
    """Estimate the cost of the remaining training runs.

    FLOPs per token: 6 for each trained weight, 4 for each frozen one, and those of the passes that
    defenses add. Defenses that ask the base about the same rows ask once.
    """
    runs = [run for run in runs_of(recipe) if not store.done(stages.train(run))]
    sized = [(r, rows[rows_key(r)], weights[method_key(r)]) for r in runs]
    tokens = [tokens_of(run, seen) if seen else None for run, seen, _ in sized]
    flops = [
        count * flops_per_token(run, w) if count and w else None
        for count, (run, _, w) in zip(tokens, sized, strict=True)
    ]
    once = {asking.key(run): (run, seen, w) for run, seen, w in sized if asking.measures(run)}
    flops += [asking.flops(run, seen, w) if seen and w else None for run, seen, w in once.values()]
    sizes: list[float | None] = [w.trainable if w else None for _, _, w in sized]
    largest = max((s for s in sizes if s), default=0)
    kept = _sum(sizes)
    return Cost(
        len(runs),
        _sum(tokens),
        _sum(flops),
        None if kept is None else kept * 4,
        None if kept is None else largest * _CHECKPOINTS * _STATE,
    )


_ADAPTER = 1.6
"""Time per operation with an adapter, whose products are small, relative to training all weights
(1.75 at 135M weights on a CPU)."""


def flops_per_token(run: Experiment, weights: Weights) -> float:
    """Floating-point operations of training per token of the user's rows, as many as would take as
    long with all weights trained."""
    forward = 2.0 * (weights.parameters + weights.added)
    whole = 2 * forward + 2 * weights.trainable
    if run.method.adapts:
        forward, whole = forward * _ADAPTER, whole * _ADAPTER
    extras = [d.extra for d in run.acting if isinstance(d, TrainDefense)]
    return whole + sum(one.forwards * forward + one.passes * whole for one in extras)


def needs_of(experiment: Experiment, rows: Rows | None) -> set[str]:
    """What is measured on the cell's models: candidates' `scores`, `replies` or `answers`."""
    from backfire.pipeline.evidence import asks_of

    labeled = rows.labeled if rows else None
    if labeled is None:
        labeled = bool(getattr(experiment.data, "labels", None))
    asks = asks_of(experiment.with_metrics(labeled=labeled), labeled=labeled)
    return {need for ask in asks for need in ask.needs}


_TESTED = 1000  # test rows, if the recipe does not limit them
_REPLY = 3
"""Time for a reply's token, in that for a prompt's, on a CPU (2.6 and 2.9 at 135M weights)."""
_STEP, _AT_ONCE = 0.03, 64
"""Assumed seconds of a GPU for the next token of all replies, of so many rows at once."""


def evaluation_seconds(
    cell: Experiment, rows: Rows, weights: Weights, device: Literal["cpu", "gpu"]
) -> float:
    """Seconds for the evaluation of a cell's model and of its base, if the test rows are as long as
    the training rows."""
    safety, needs = cell.safety, needs_of(cell, rows)
    sets = [cell.data, *((safety.harmful, safety.allowed) if safety else ())]
    count = sum(one.test_rows or _TESTED for one in sets if one)
    count *= 2 * (1 + cell.poisons)  # two models; with triggers, and without
    forward = 2.0 * (weights.parameters + weights.added) / ASSUMED[device]
    seconds = count * rows.tokens * forward
    if "replies" in needs:
        new = cell.evaluation.max_new_tokens
        models = 2 if cell.guard and cell.guard.needs_reference else 1
        replies = models * count * new * _REPLY * forward
        steps = models * math.ceil(count / _AT_ONCE) * new * _STEP
        seconds += replies if device == "cpu" else max(steps, models * count * new * forward)
    return seconds


def least_memory(experiment: Experiment, weights: Weights) -> float:
    """Bytes of weights, gradients and optimizer."""
    method = experiment.method
    bits = 4 if "load_in_4bit" in (packed := method.quantization("cpu")) else 8 if packed else 0
    kind = "float32" if not method.adapts and method.trains else experiment.model.dtype
    each = bits / 8 or _ITEM.get(kind, 4)
    trained = weights.trainable * method.trains
    optimizer = 2 if "8bit" in experiment.train.optimizer else 8
    return weights.parameters * each + weights.added * 4 + trained * (2 + optimizer)


_ITEM = {"bfloat16": 2, "float16": 2}
_MOST = 0.5  # share of the memory; activations usually take less than the rest


def float16_on_cpu(recipe: Recipe) -> list[str]:
    """A note if models run in float16 where there is no GPU."""
    cells = [*recipe.cells, *runs_of(recipe)]
    kinds: dict[str, set[str | None]] = {
        "model.dtype": {cell.model.dtype for cell in cells},
        "train.compute": {cell.train.compute for cell in cells if cell.method.trains},
        "method.compute": {getattr(cell.method, "compute", None) for cell in cells},
    }
    return [
        f"{knob}=float16: on a CPU that is slow, and numbers above 65,504 overflow; auto chooses "
        "a type that suits it."
        for knob, chosen in kinds.items()
        if "float16" in chosen
    ]


def too_large(recipe: Recipe, has: float, store: Store) -> list[str]:
    """A note for each model and method that takes most of this many bytes of memory even without
    activations, by the number of weights."""
    notes = dict[str, None]()
    for run in {method_key(run): run for run in runs_of(recipe)}.values():
        weights = rough_weights(run, model_folder(run.model, store))
        if weights and (need := least_memory(run, weights)) > _MOST * has:
            rest = "says what would fit" if need > has else "counts the activations as well"
            notes[
                f"{run.model.name}, {run.method.name}: weights, gradients and optimizer alone need "
                f"{amount(need)}, and there are {amount(has)} of memory; `backfire doctor RECIPE` "
                f"{rest}."
            ] = None
    return list(notes)


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None if any value is."""
    return None if None in values else sum(value or 0 for value in values)


def describe_cost(cost: Cost, rate: float, source: str) -> list[str]:
    """One line each for time and disk. `rate` is in useful FLOP/s; `source` says where it is
    from."""
    if not cost.runs:
        return ["time: none; every training run is done"]
    missing = "rows" if cost.tokens is None else "model files"
    time = f"time: unknown; the {missing} are not on this machine"
    if cost.tokens is not None and cost.flops is not None:
        time = (
            f"time: about {duration(cost.flops / rate)} for {cost.tokens / 1e6:,.2f} M tokens at "
            f"{rate / 1e9:,.0f} GFLOP/s ({source}), plus evaluation"
        )
    disk = "disk: unknown; the model files are not on this machine"
    if cost.kept is not None and cost.checkpoints is not None:
        disk = (
            f"disk: about {amount(cost.kept)} for tuned models and adapters, and up to "
            f"{amount(cost.checkpoints)} of checkpoints while a run lasts"
        )
    return [time, disk]


def amount(num_bytes: float) -> str:
    """Format bytes in GB (10^9 bytes) or MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


# ----------------------------------------------------------------------------- learning rates

_FAR = 5  # times the default rate; only a note, since a sweep may go further on purpose


def describe_rates(recipe: Recipe) -> list[str]:
    """A line with each method's learning rate and the base sizes, then a note for each high
    rate."""
    runs = runs_of(recipe)
    rates = dict.fromkeys(f"{run.method.name} {run.learning_rate:g}" for run in runs)
    bases = dict.fromkeys(_size(run) for run in runs)
    line = f"learning rate: {', '.join(rates)} (base: {', '.join(bases)})"
    return [line, *high_rates(recipe)] if rates else []


def high_rates(recipe: Recipe) -> list[str]:
    """A note for each explicit rate far above the default for a large base."""
    notes = dict[str, None]()
    for run in runs_of(recipe):
        usual, named = run.method.rates[1], run.method.learning_rate
        if named and named > _FAR * usual and (num_weights(run.model) or 0) >= LARGE:
            notes[
                f"{run.method.label()}: learning_rate={named:g} is {named / usual:.0f} times the "
                f"default for a base of {_size(run)}; set it to null for the default ({usual:g})."
            ] = None
    return list(notes)


def _size(run: Experiment) -> str:
    count = num_weights(run.model)
    return "unknown size, assumed large" if count is None else f"{count / 1e6:,.3g} M weights"
