"""The workload of the GPU benchmark, and its number of useful FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backfire.base import Rendered, Row
from backfire.rng import stream

if TYPE_CHECKING:
    import torch

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}

LEARNING_RATE = 1e-5
NUM_PROMPTS, NEW_TOKENS = 128, 64
"""Prompts and new tokens per reply of `--compare`."""

PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX A6000": 155e12,
}
"""Dense products in bfloat16, FLOP/s, from the makers' data sheets (half of their figure with
sparsity). The first entry that is a whole word of the device's name applies. Gaming cards are left
out: too many kinds share a name."""


@dataclass(frozen=True)
class Load:
    """The training rows: up to `length` tokens each, at least half as many where the answer allows,
    of which the last `answer` are supervised, and the first are the same, as in a template."""

    length: int
    answer: int
    batch: int
    warm_up: int
    steps: int

    @property
    def shared(self) -> int:
        """Number of tokens with which all rows begin."""
        return min(self.length // 4, self.length - self.answer - 1)

    def rows(self, vocabulary: int) -> list[Rendered]:
        """Rows of random tokens, different in every step but for their opening."""
        rng, blank = stream(0, "bench"), Row(id="random", instruction="")
        least = max(self.length // 2, self.shared + 1 + self.answer)
        opening = [rng.randrange(3, vocabulary) for _ in range(self.shared)]
        found = []
        for _ in range(self.batch * (self.warm_up + self.steps)):
            length = rng.randint(least, self.length)
            own = [rng.randrange(3, vocabulary) for _ in range(length - self.shared)]
            found.append(Rendered(blank, opening + own, length - self.answer))
        return found


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a GPU in `PEAKS`; None for any other device."""
    if device.type != "cuda":
        return None
    import torch

    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Peak FLOP/s by the words of a device's name; None if unknown."""
    words = f" {' '.join(name.replace('-', ' ').split())} "
    return next((peak for gpu, peak in PEAKS.items() if f" {gpu} " in words), None)
