"""How much memory training will take, reckoned from the model's shape before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backfire.experiment import Experiment
from backfire.launch.workload import Rows, Weights

if TYPE_CHECKING:
    import torch

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


def size(cell: Experiment, folder: Path | None) -> Size:
    """Counted on the model's modules as the method changes them, without any weights.

    Raises:
        UserError: the configuration is not understood, or the method does not suit the model.
    """
    import torch

    from backfire.model.load import skeleton
    from backfire.model.pretrain import _new_model
    from backfire.sandbox.base import Pretrain

    with torch.device("meta"):
        if cell.model.name == "sandbox" or folder is None:
            base = _new_model(Pretrain(), Pretrain().vocab_size, 0, 1)
        else:
            base = skeleton(folder)
        head, config = base.get_output_embeddings(), base.config.get_text_config()
        layers = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        linear, parameters = sum(m.weight.numel() for m in layers), base.num_parameters()
        weights = list(cell.method.attach(base, cell.seed).parameters())
    return Size(
        parameters,
        added=sum(p.numel() for p in weights) - parameters,
        trainable=sum(p.numel() for p in weights if p.requires_grad) * cell.method.trains,
        linear=linear,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def memory(cell: Experiment, size: Size, rows: Rows | None, device: torch.device) -> Memory:
    """What training takes on this device. Rows that are not known are of `max_length` tokens; their
    answer is a label of few tokens, or a fourth of that."""
    from backfire.model.load import dtype_of
    from backfire.train.precision import compute_type

    whole, compute = cell.method.name == "full", compute_type(cell.train.compute, device)
    aligned = cell.align is not None and (cell.align.merge or not cell.align.method.adapts)
    wide = 4 if whole or aligned else dtype_of(cell.model, device).itemsize
    weights: float = size.parameters * wide + size.added * 4
    if bits := cell.method.quantization(device.type):
        # Constants: one in 64 weights, in 4 bytes, or quantized again to one. The rest is float32.
        constants = (1 + 4 / 256 if bits.get("bnb_4bit_use_double_quant") else 4) / 64
        each = 1 if bits.get("load_in_8bit") else 0.5 + constants
        weights = size.linear * each + (size.parameters - size.linear + size.added) * 4
    elif cell.method.trains and wide == 4 and compute == "bfloat16":
        weights += size.linear * 2  # autocast's copies live until the backward pass is over
    longest = rows.longest if rows else cell.train.max_length
    unseen = 8 if getattr(cell.data, "labels", None) else cell.train.max_length / 4
    answer = rows.answer if rows else unseen
    kept = (
        longest * size.layers * size.hidden * _KEPT[device.type, compute]
        + answer * size.vocabulary * _LOGIT
    )
    num_rows = min(cell.train.batch_size, rows.count if rows else cell.train.batch_size)
    return Memory(weights, size.trainable * _STATE, kept, num_rows * cell.method.trains)
