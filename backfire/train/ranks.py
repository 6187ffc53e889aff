"""What the ranks of one training run tell each other: one process per device.

Every rank runs the same steps on the same weights. It computes the gradients of its share of a
step's rows, and these are summed over the ranks, so that defenses and the optimizer see the
gradients of the whole step and all ranks make the same update. Everything else that a step depends
on is a function of the seed and the step. With one rank nothing is sent, and torch.distributed is
not imported.

Memory may run out on one rank alone. So every exchange within a step starts with a flag, and a rank
that ran out raises it instead: then all ranks repeat the step in smaller passes. With sharded
weights they start again, from the last checkpoint (`train.team`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from backfire.errors import CellError
from backfire.train.devices import OUT_OF_MEMORY

T = TypeVar("T")

_BUCKET = 2**26
"""Most weights whose gradients are summed at once: a copy of 256 MiB."""


class OtherOutOfMemoryError(MemoryError):
    """Memory ran out on another rank."""


@dataclass
class Ranks:
    """This process among those of a training run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    places: Sequence[str] = ()
    """Host and device of each rank."""
    sharded: bool = field(default=False, init=False)
    """Whether each rank holds only a part of every weight; then all must make the same passes."""
    told: bool = field(default=False, init=False)
    """Whether all ranks already know that memory ran out in this try."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def own(self) -> tuple[int, ...]:
        """What a seed has in addition where ranks must not draw the same; empty for the first."""
        return () if self.leads else (self.rank,)

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """The rows that this rank computes; there may be none."""
        return rows[self.rank :: self.size]

    def summed(self, weights: Mapping[str, nn.Parameter], loss: Tensor) -> Tensor:
        """Make the gradients of these weights those of all ranks' rows; returns the sum of their
        losses. A weight without a gradient on every rank stays without."""
        if not self.several or self.sharded:  # FSDP2 has summed the gradients
            return self.total(loss)
        every = list(weights.values())
        wide = torch.promote_types(every[0].dtype, torch.float32)
        has = torch.tensor([p.grad is not None for p in every], dtype=wide, device=self.device)
        head = torch.cat([loss.detach().to(wide).view(1), has])
        for number, part in enumerate(_buckets(every)):
            pieces = [_flat(p, wide) for p in part]
            flat = torch.cat([head, *pieces] if number == 0 else pieces)
            self._check_memory()  # after the copy, for which there may be no room on one rank
            self._reduce(flat)
            if number == 0:
                head, flat = flat[: len(head)], flat[len(head) :]
                has_any = dict(zip(every, (head[1:] > 0).tolist(), strict=True))
            for p, piece in zip(part, torch.split(flat, [p.numel() for p in part]), strict=True):
                p.grad = piece.view_as(p).to(p.dtype) if has_any[p] else None
        return head[0].to(loss.dtype)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in a step."""
        if not self.several:
            return value
        value = value.to(self.device, copy=True)
        self._check_memory()
        self._reduce(value)
        return value

    def first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the first rank, where each rank has computed the same but may have rounded
        differently."""
        if not self.several or not tensors:
            return dict(tensors)
        every = list(tensors.values())
        flat = torch.cat([t.flatten() for t in every])
        joined = self.total(flat if self.leads else torch.zeros_like(flat))
        parts = torch.split(joined, [t.numel() for t in every])
        return {n: part.view_as(tensors[n]) for n, part in zip(tensors, parts, strict=True)}

    def out_of_memory(self, mine: bool) -> bool:
        """Whether memory ran out on any rank in the try that ends here; `mine`: on this one.

        Raises:
            CellError: it did (`oom`) with sharded weights, where no rank can repeat a pass alone.
        """
        if not self.several:
            return mine
        if self.sharded and mine:
            raise CellError("oom", OUT_OF_MEMORY)
        told, self.told = self.told, False
        return told or self.largest(float(mine)) > 0

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        if not self.several:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        self._reduce(found, "MAX")
        return float(found)

    def smallest(self, value: float) -> float:
        """The smallest of the ranks' values."""
        return -self.largest(-value)

    def leaders(self, value: int) -> int:
        """The first rank's value. The others wait for it."""
        return int(self.largest(value if self.leads else -(2**62)))

    def agree(self, values: Sequence[float], what: str) -> None:
        """Check that all ranks have the same values.

        Raises:
            CellError: they differ (`failed`); `what` names them in the message.
        """
        if not self.several:
            return
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        both = torch.cat([own, -own])
        self._reduce(both, "MAX")
        high, low = both.chunk(2)
        if not torch.equal(high, -low):
            raise CellError(
                "failed", f"The devices differ in {what}, so they no longer train one model."
            )

    def agree_on_weights(self, checksum: Sequence[float]) -> None:
        """Check that all ranks have the same weights; sharded ones differ.

        Raises:
            CellError: they do not (`failed`).
        """
        if not self.sharded:
            self.agree(checksum, "their weights")

    def decide(self, wanted: bool) -> bool:
        """Whether to write a checkpoint, which each rank helps with if the weights are sharded, and
        else the first alone: only its clock counts."""
        return bool(self.leaders(wanted)) if self.sharded else wanted and self.leads

    def record(self) -> dict[str, Any]:
        """What the summary of a training run says about its devices; nothing of a single one."""
        if not self.several:
            return {}
        import torch.distributed as dist

        assert dist.get_world_size() == len(self.places) == self.size
        return {
            "devices": dist.get_world_size(),
            "places": list(self.places),
            "backend": dist.get_backend(),
            "sharded": self.sharded,
        }

    def _check_memory(self) -> None:
        """Join the other ranks in an exchange.

        Raises:
            OtherOutOfMemoryError: one of them ran out of memory.
        """
        if self.largest(0.0) > 0:
            self.told = True
            raise OtherOutOfMemoryError

    def _reduce(self, tensor: Tensor, how: str = "SUM") -> None:
        """Replace the tensor by its sum over the ranks, or its maximum."""
        import torch.distributed as dist

        dist.all_reduce(tensor, getattr(dist.ReduceOp, how))


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The weights in order, in parts of at most `_BUCKET` numbers or one weight."""
    part: list[nn.Parameter] = []
    for p in weights:
        if part and sum(q.numel() for q in part) + p.numel() > _BUCKET:
            yield part
            part = []
        part.append(p)
    yield part


def _flat(weight: nn.Parameter, kind: torch.dtype) -> Tensor:
    if weight.grad is None:
        return torch.zeros(weight.numel(), dtype=kind, device=weight.device)
    return weight.grad.flatten().to(kind)
