"""How far the trained weights have moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

_IN_MEMORY = 50_000_000  # weights; of more than that, what is on disk is left there
_AT_MOST = 1_000_000_000  # weights held in memory that no file has; 4 GB


class Origin:
    """The weights as they were at the start.

    What a file of the folder holds is read again from there, in the type it was loaded in, so that
    a large model is not kept twice. Adapters, and all of a small model, stay in memory.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], folder: Path | None) -> None:
        self.folder, self.on_disk = folder, dict[str, torch.dtype]()
        if folder and sum(p.numel() for p in weights.values()) > _IN_MEMORY:
            for name, stored in _stored(folder, weights):
                if (kind := _loaded_as(stored, weights[name].detach().cpu())) is not None:
                    self.on_disk[name] = kind
        rest = {n: p for n, p in weights.items() if n not in self.on_disk}
        self.known = sum(p.numel() for p in rest.values()) <= _AT_MOST
        self.kept = {n: p.detach().cpu().clone() for n, p in rest.items()} if self.known else {}

    def moved(self, weights: Mapping[str, nn.Parameter]) -> float | None:
        """2-norm of the difference to these weights, which are those of the start or some of them;
        None: there were too many to keep."""
        if not self.known:
            return None
        total = 0.0
        for name, start in self._starts(weights):
            now = weights[name].detach().cpu()
            total += float((now.double() - start.double()).pow(2).sum())
        return math.sqrt(total)

    def _starts(self, weights: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, start) for name, start in self.kept.items() if name in weights)
        if self.folder and self.on_disk:
            left = {name: kind for name, kind in self.on_disk.items() if name in weights}
            for name, stored in _stored(self.folder, left):
                yield name, stored.to(left[name]).to(weights[name].dtype)


def _stored(folder: Path, names: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """These of the weights in the folder's files, one at a time."""
    seen = set[str]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in names and name not in seen:
                    seen.add(name)
                    yield name, opened.get_tensor(name)


def _loaded_as(stored: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type that makes of what is stored exactly this weight; None: it is another."""
    if stored.shape != weight.shape:
        return None
    kinds = (stored.dtype, torch.bfloat16, torch.float16)
    return next((k for k in kinds if torch.equal(stored.to(k).to(weight.dtype), weight)), None)
