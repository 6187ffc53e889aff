"""Whether a recipe fits this machine, and how long it will take: `backfire doctor RECIPE`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backfire.commands.doctor import ram_bytes
from backfire.commands.estimate import (
    Rows,
    Weights,
    amount,
    cost,
    describe_cost,
    lengths,
    model_folder,
    pair,
    runs_of,
    shown,
)
from backfire.experiment import Experiment
from backfire.recipe import Recipe
from backfire.store import Store

if TYPE_CHECKING:
    import torch

_SHARE = 0.4
"""What training comes to, of the speed of large products: 0.25 to 0.55 was seen on CPUs."""
_TIGHT = 0.8  # share of the memory beyond which the estimate's own error decides
_NAMED = ("rank", "length", "layers", "dora")  # knobs by which a method takes more or less


_KEPT = {
    ("cpu", "float32"): 140,
    ("cpu", "bfloat16"): 110,
    ("cuda", "float32"): 80,
    ("cuda", "bfloat16"): 55,
}
"""Bytes of activations for each token, layer and unit of width, by device and type of the products.
On a CPU, by how much the process grew with the batch (Llama shapes; full tuning, LoRA, 4 and 8
bits: 107 to 169 and 93 to 126). On a GPU, what is kept for the backward pass (77 to 83 and 50 to
56), counted on a CPU."""
_LOGIT = 12  # bytes for each answer token and word of the vocabulary: logits, softmax, gradient
_STATE = 12  # bytes for each trained weight: its gradient and AdamW's two moments, in float32
_LIBRARIES = 1e9  # torch and the others; on a GPU its context


@dataclass(frozen=True)
class Size(Weights):
    """The same, and the shape of the base."""

    linear: int
    """Weights in linear layers other than the head: those that can be quantized."""
    layers: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of training, if a whole step is one forward pass."""

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
        """Rows in one forward pass for which there is room."""
        return max(0, int((limit - self.total + self.activations) / max(self.one_row, 1)))


def size(experiment: Experiment, folder: Path | None) -> Size:
    """Counted on the model's modules as the method changes them, without any weights.

    Raises:
        UserError: the configuration is not understood, or the method does not suit the model.
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
    """What training takes on this device. Rows that are not known are of `max_length` tokens; their
    answer is a label of few tokens, or a fourth of that."""
    from backfire.model.load import dtype_of
    from backfire.train.precision import compute_type

    whole, compute = (
        experiment.method.name == "full",
        compute_type(experiment.train.compute, device),
    )
    aligned = experiment.align is not None and (
        experiment.align.merge or not experiment.align.method.adapts
    )
    wide = 4 if whole or aligned else dtype_of(experiment.model, device).itemsize
    weights: float = size.parameters * wide + size.added * 4
    if bits := experiment.method.quantization(device.type):
        # Constants: one in 64 weights, in 4 bytes, or quantized again to one. The rest is float32.
        constants = (1 + 4 / 256 if bits.get("bnb_4bit_use_double_quant") else 4) / 64
        each = 1 if bits.get("load_in_8bit") else 0.5 + constants
        weights = size.linear * each + (size.parameters - size.linear + size.added) * 4
    elif experiment.method.trains and wide == 4 and compute == "bfloat16":
        weights += size.linear * 2  # autocast's copies live until the backward pass is over
    longest = rows.longest if rows else experiment.train.max_length
    unseen = 8 if getattr(experiment.data, "labels", None) else experiment.train.max_length / 4
    answer = rows.answer if rows else unseen
    kept = (
        longest * size.layers * size.hidden * _KEPT[device.type, compute]
        + answer * size.vocabulary * _LOGIT
    )
    num_rows = min(experiment.train.batch_size, rows.count if rows else experiment.train.batch_size)
    return Memory(weights, size.trainable * _STATE, kept, num_rows * experiment.method.trains)


def lines(recipe: Recipe) -> list[str]:
    """Memory for each model and method of a recipe, time and disk for all. Nothing is fetched.

    Raises:
        UserError: the data cannot be read, or a method does not suit its model.
    """
    from backfire.commands.run import default_workers
    from backfire.model.load import device_of

    store, device = Store(), device_of("auto")
    cells = [*recipe.cells, *runs_of(recipe)]
    rows, sizes = lengths(cells, store), dict[str, Size | None]()
    workers = default_workers(len(recipe.cells))
    out = [f"\nRecipe {recipe.name}, {len(recipe.cells)} cells; all figures are estimates"]
    for experiment in {pair(experiment): experiment for experiment in cells}.values():
        folder = model_folder(experiment.model, store)
        known = experiment.model.name == "sandbox" or (
            folder and (folder / "config.json").is_file()
        )
        sizes[pair(experiment)] = found = size(experiment, folder) if known else None
        if found is None:
            out.append(
                f"note  {_title(experiment)}: its config.json is not on this machine, so its size "
                f"is unknown (hf download {experiment.model.name} config.json)"
            )
            continue
        alike = [other for other in cells if pair(other) == pair(experiment)]
        needs = [memory(other, found, rows[shown(other)], device) for other in alike]
        need = max(needs, key=lambda need: need.total)
        mark, verdict = _verdict(need, _memory(device), workers, device.type)
        out.append(f"{mark} {_title(experiment)}: {_parts(found, need)} of {verdict}")
    rate = _SHARE * _measured(device)
    of_what = f"{_SHARE} of what products of large matrices reach here"
    costs = describe_cost(cost(recipe, store, rows, sizes), rate, of_what)
    return [*out, *(f"note  {line}" for line in costs)]


def _title(experiment: Experiment) -> str:
    knobs = [f"{k}={v}" for k, v in experiment.method.spec().items() if k in _NAMED]
    return " ".join([f"{experiment.model.name}, {experiment.method.name}", *knobs])


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
    """A mark, and in words whether it fits, or how it would."""
    if workers * need.total <= _TIGHT * has:
        return "ok   ", f"{amount(has)}: fits"
    if need.total <= _TIGHT * has:
        return "note ", f"{amount(has)}: fits, but not {workers} at once (--workers 1)"
    within = need.rows_within(_TIGHT * has)
    if device == "cuda" and 0 < within < need.num_rows:
        return "ok   ", f"{amount(has)}: fits about {within} rows at a time (the loop sees to that)"
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
    """FLOP/s of large matrix products in the type that training takes, over a fraction of a second,
    with all threads."""
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
