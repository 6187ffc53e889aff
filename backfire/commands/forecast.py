"""`backfire doctor RECIPE`: whether a recipe fits this machine, and how long it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backfire.commands.estimate import (
    Rows,
    Weights,
    amount,
    cost,
    describe_cost,
    method_key,
    model_folder,
    rows_by_key,
    rows_key,
    runs_of,
)
from backfire.experiment import Experiment
from backfire.model.types import ram_bytes
from backfire.recipe import Recipe
from backfire.store import Store

if TYPE_CHECKING:
    import torch

_SHARE = 0.4
"""Speed of training relative to large matrix products: 0.25 to 0.55 was measured on CPUs."""
_TIGHT = 0.8  # share of the memory above which the error of the estimate matters
_NAMED = ("rank", "length", "layers", "dora")  # knobs that change the memory of a method


_KEPT = {
    ("cpu", "float32"): 140,
    ("cpu", "bfloat16"): 110,
    ("cuda", "float32"): 80,
    ("cuda", "bfloat16"): 55,
}
"""Bytes of activations per token, layer and unit of width, by device and compute type.

On a CPU: growth of the process with the batch size (Llama shapes; full tuning, LoRA, 4 and 8 bits:
107 to 169 and 93 to 126). On a GPU: tensors kept for the backward pass (77 to 83 and 50 to 56),
counted on a CPU."""
_LOGIT = 12  # bytes per answer token and vocabulary entry: logits, softmax, gradient
_STATE = 12  # bytes per trained weight: gradient and AdamW's two moments, in float32
_LIBRARIES = 1e9  # torch and other libraries; on a GPU, the CUDA context


@dataclass(frozen=True)
class Size(Weights):
    """Weight counts, and the shape of the base."""

    linear: int
    """Weights in linear layers other than the head, which can be quantized."""
    layers: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Peak memory of training in bytes, if a whole step is one forward pass."""

    weights: float
    state: float
    one_row: float
    num_rows: int

    @property
    def activations(self) -> float:
        return self.one_row * self.num_rows

    @property
    def total(self) -> float:
        return self.weights + self.state + self.activations + _LIBRARIES

    def rows_within(self, limit: float) -> int:
        """Number of rows per forward pass that fit within `limit` bytes."""
        return max(0, int((limit - self.total + self.activations) / max(self.one_row, 1)))


def size(experiment: Experiment, folder: Path | None) -> Size:
    """Count the weights of the model with the method attached, on the meta device.

    Raises:
        UserError: the configuration is not supported, or the method does not fit the model.
    """
    import torch

    from backfire.model.load import skeleton
    from backfire.sandbox.base import Pretrain
    from backfire.train.pretrain import _new_model

    with torch.device("meta"):
        if experiment.model.name == "sandbox" or folder is None:
            base = _new_model(Pretrain(), Pretrain().vocab_size, 0, 1)
        else:
            base = skeleton(folder)
        head, config = base.get_output_embeddings(), base.config.get_text_config()
        layers = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        linear, parameters = sum(m.weight.numel() for m in layers), base.num_parameters()
        weights = list(experiment.method.attach(base, experiment.seed).parameters())
    return Size(
        parameters,
        added=sum(p.numel() for p in weights) - parameters,
        trainable=sum(p.numel() for p in weights if p.requires_grad) * experiment.method.trains,
        linear=linear,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def memory(experiment: Experiment, size: Size, rows: Rows | None, device: torch.device) -> Memory:
    """Estimate the memory of training on this device.

    Unknown rows are assumed to have `max_length` tokens, and an answer of 8 tokens with labels,
    else a quarter of `max_length`.
    """
    from backfire.model.load import dtype_of
    from backfire.train.precision import compute_type

    whole = experiment.method.name == "full"
    compute = compute_type(experiment.train.compute, device)
    aligned = experiment.align is not None and (
        experiment.align.merge or not experiment.align.method.adapts
    )
    wide = 4 if whole or aligned else dtype_of(experiment.model, device).itemsize
    weights: float = size.parameters * wide + size.added * 4
    if bits := experiment.method.quantization(device.type):
        # One constant per 64 weights, in 4 bytes or quantized to 1. Other weights are float32.
        constants = (1 + 4 / 256 if bits.get("bnb_4bit_use_double_quant") else 4) / 64
        each = 1 if bits.get("load_in_8bit") else 0.5 + constants
        weights = size.linear * each + (size.parameters - size.linear + size.added) * 4
    elif experiment.method.trains and wide == 4 and compute == "bfloat16":
        weights += size.linear * 2  # autocast's copies live until the end of the backward pass
    longest = rows.longest if rows else experiment.train.max_length
    assumed = 8 if getattr(experiment.data, "labels", None) else experiment.train.max_length / 4
    answer = rows.answer if rows else assumed
    one_row = (
        longest * size.layers * size.hidden * _KEPT[device.type, compute]
        + answer * size.vocabulary * _LOGIT
    )
    batch_size = experiment.train.batch_size
    num_rows = min(batch_size, rows.count) if rows else batch_size
    return Memory(weights, size.trainable * _STATE, one_row, num_rows * experiment.method.trains)


def lines(recipe: Recipe) -> list[str]:
    """Memory for each model and method of a recipe, time and disk in total; nothing is downloaded.

    Raises:
        UserError: the data cannot be read, or a method does not fit its model.
    """
    from backfire.commands.run import default_workers
    from backfire.model.load import device_of

    store, device = Store(), device_of("auto")
    cells = [*recipe.cells, *runs_of(recipe)]
    rows, sizes = rows_by_key(cells, store), dict[str, Size | None]()
    workers = default_workers(len(recipe.cells))
    out = [f"\nRecipe {recipe.name}, {len(recipe.cells)} cells; all figures are estimates"]
    for experiment in {method_key(experiment): experiment for experiment in cells}.values():
        folder = model_folder(experiment.model, store)
        has_config = experiment.model.name == "sandbox" or (
            folder and (folder / "config.json").is_file()
        )
        sizes[method_key(experiment)] = counts = size(experiment, folder) if has_config else None
        if counts is None:
            get = f"hf download {experiment.model.name} config.json"
            get = "`backfire validate` converts it" if experiment.model.is_gguf else get
            out.append(
                f"note  {_title(experiment)}: its config.json is not on this machine, so its size "
                f"is unknown ({get})"
            )
            continue
        alike = [other for other in cells if method_key(other) == method_key(experiment)]
        needs = [memory(other, counts, rows[rows_key(other)], device) for other in alike]
        need = max(needs, key=lambda need: need.total)
        mark, verdict = _verdict(need, _memory(device), workers, device.type)
        out.append(f"{mark} {_title(experiment)}: {_parts(counts, need)} of {verdict}")
    rate = _SHARE * _measured(device)
    source = f"{_SHARE} of the speed of large matrix products here"
    costs = describe_cost(cost(recipe, store, rows, sizes), rate, source)
    return [*out, *(f"note  {line}" for line in costs)]


def _title(experiment: Experiment) -> str:
    knobs = [f"{k}={v}" for k, v in experiment.method.spec().items() if k in _NAMED]
    return " ".join([f"{experiment.model.title}, {experiment.method.name}", *knobs])


def _parts(size: Size, need: Memory) -> str:
    count = f"{size.parameters / 1e6:,.2f} M weights"
    if not size.trainable:
        return f"{count}, none trained: {amount(need.total)} with the libraries"
    return (
        f"{count}, {size.trainable / 1e6:,.2f} M trained: {amount(need.weights)} weights + "
        f"{amount(need.state)} gradients and AdamW + {amount(need.activations)} activations of "
        f"{need.num_rows} rows + libraries = {amount(need.total)}"
    )


def _verdict(need: Memory, has: float, workers: int, device: str) -> tuple[str, str]:
    """A mark, and whether it fits or which option makes it fit."""
    if workers * need.total <= _TIGHT * has:
        return "ok   ", f"{amount(has)}: fits"
    if need.total <= _TIGHT * has:
        return "note ", f"{amount(has)}: fits, but not {workers} at once (--workers 1)"
    within = need.rows_within(_TIGHT * has)
    if device == "cuda" and 0 < within < need.num_rows:
        return (
            "ok   ",
            f"{amount(has)}: fits about {within} rows at a time (training splits the batch)",
        )
    hint = f" (--micro-batch {within} would fit)" if 0 < within < need.num_rows else ""
    if need.total <= has:
        return "note ", f"{amount(has)}: is tight{hint}"
    return "lacks", f"{amount(has)}: does not fit{hint}"


def _memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return ram_bytes()


def _measured(device: torch.device) -> float:
    """Measure the FLOP/s of large matrix products in the compute type of training, for a fraction
    of a second with all threads."""
    import torch

    from backfire.train.precision import compute_type

    on_gpu = device.type == "cuda"
    width, at_once = (8192, 10) if on_gpu else (1024, 1)
    dtype = getattr(torch, compute_type("auto", device))
    a = torch.randn(width, width, device=device, dtype=dtype)
    count, begin = -1, 0.0  # the first round is a warm-up
    while count < 0 or time.perf_counter() - begin < 0.2:
        for _ in range(at_once):
            a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        begin, count = (time.perf_counter(), 0) if count < 0 else (begin, count + at_once)
    return count * 2 * width**3 / (time.perf_counter() - begin)
