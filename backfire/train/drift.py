"""Distance of the trained weights from their start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from backfire.train.ranks import Ranks
from backfire.train.sharding import local, part_of

_IN_MEMORY = 50_000_000  # weights; a larger model is read from disk again
_AT_MOST = 1_000_000_000  # weights that no file holds and that are copied in memory; 4 GB


class Origin:
    """The weights at the start of training.

    Weights of a large model are read again from the files in `folder`, in the type they were loaded
    in, so that they are not held twice. Adapters and small models are copied in memory.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], folder: Path | None) -> None:
        self.folder, self.on_disk = folder, dict[str, torch.dtype]()
        if folder and sum(p.numel() for p in weights.values()) > _IN_MEMORY:
            for name, stored in _stored(folder, weights):
                own = local(weights[name].detach()).cpu()
                if (kind := _loaded_as(_part(stored, weights[name]), own)) is not None:
                    self.on_disk[name] = kind
        rest = {n: p for n, p in weights.items() if n not in self.on_disk}
        self.complete = sum(p.numel() for p in rest.values()) <= _AT_MOST
        self.copies = (
            {n: local(p.detach()).cpu().clone() for n, p in rest.items()} if self.complete else {}
        )

    def moved(
        self, weights: Mapping[str, nn.Parameter], ranks: Ranks | None = None
    ) -> float | None:
        """2-norm of the change of these weights; None if there were too many to copy.

        `weights` may be a subset of those at the start.
        """
        if not self.complete:
            return None
        total = 0.0
        for name, start in self._starts(weights):
            now = local(weights[name].detach()).cpu()
            moved = now.to(torch.promote_types(now.dtype, start.dtype)) - start
            # No float64 copy of a large weight.
            total += float(torch.linalg.vector_norm(moved, dtype=torch.float64)) ** 2
        if ranks and ranks.sharded:
            total = float(ranks.total(torch.tensor(total, dtype=torch.float64)))
        return math.sqrt(total)

    def _starts(self, weights: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, start) for name, start in self.copies.items() if name in weights)
        if self.folder and self.on_disk:
            left = {name: kind for name, kind in self.on_disk.items() if name in weights}
            for name, stored in _stored(self.folder, left):
                yield name, _part(stored, weights[name]).to(left[name]).to(weights[name].dtype)


def _part(stored: Tensor, weight: Tensor) -> Tensor:
    """The part of a stored tensor that this rank holds of the weight."""
    return local(part_of(stored, weight)).cpu() if stored.shape == weight.shape else stored


def _stored(folder: Path, names: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """Yield these weights from the folder's files, one at a time."""
    seen = set[str]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in names and name not in seen:
                    seen.add(name)
                    yield name, opened.get_tensor(name)


def _loaded_as(stored: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which the stored tensor equals this weight exactly; None if there is none."""
    if stored.shape != weight.shape:
        return None
    kinds = (stored.dtype, torch.bfloat16, torch.float16)
    return next((k for k in kinds if torch.equal(stored.to(k).to(weight.dtype), weight)), None)
