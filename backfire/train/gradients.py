"""Access to a run's gradients, for steps with more than one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from backfire.rng import derive
from backfire.train.ranks import Ranks
from backfire.train.sharding import is_sharded, local, part_of, whole


class Gradients:
    """Moves gradients out of the weights and back; names are those of `TrainingRun.trainable`."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], seed: int, ranks: Ranks | None = None
    ) -> None:
        self.weights, self.seed, self.ranks = weights, seed, ranks or Ranks()

    def take(self) -> dict[str, Tensor]:
        """Return the gradients and clear them from the weights."""
        taken = {name: p.grad for name, p in self.weights.items() if p.grad is not None}
        for parameter in self.weights.values():
            parameter.grad = None
        return taken

    def add(self, gradients: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add `scale` times these gradients to those of the weights."""
        for name, gradient in gradients.items():
            parameter = self.weights[name]
            part = (gradient if scale == 1 else gradient * scale).to(parameter.dtype)
            parameter.grad = part if parameter.grad is None else parameter.grad + part

    def length(self) -> Tensor:
        """2-norm of the weights' gradients."""
        return self.norm(p.grad for p in self.weights.values() if p.grad is not None)

    @staticmethod
    def wide(tensor: Tensor) -> torch.dtype:
        """The tensor's type, but at least float32: for sums and norms."""
        return torch.promote_types(tensor.dtype, torch.float32)

    def norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """2-norm over all tensors."""
        every = list(tensors)
        return self._norm(every, over_ranks=any(map(is_sharded, every)))

    def sum(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sum of all their numbers."""
        return whole(torch.stack([tensor.sum() for tensor in tensors]).sum())

    def norm_over_ranks(self, tensors: Iterable[Tensor]) -> Tensor:
        """2-norm over the tensors of all ranks: for activations, of which each has its rows'."""
        return self._norm(list(tensors), over_ranks=self.ranks.several)

    def _norm(self, tensors: list[Tensor], *, over_ranks: bool) -> Tensor:
        own = map(local, tensors)
        parts = [torch.linalg.vector_norm(t, dtype=self.wide(t)) for t in own]
        parts = [part.to(parts[0].device) for part in parts]  # a base may be on several GPUs
        norm = torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())
        return self.ranks.total(norm.pow(2)).sqrt() if over_ranks else norm

    def random_like(self, tensors: Mapping[str, Tensor], *purpose: object) -> dict[str, Tensor]:
        """Random tensors for a null control, with the same shapes, zeros (such as padding, or words
        that do not occur) and total 2-norm."""
        drawn = {}
        for name, tensor in tensors.items():
            generator = torch.Generator(tensor.device)
            generator.manual_seed(derive(self.seed, *purpose, name))
            shape, device = tensor.shape, tensor.device
            noise = torch.randn(shape, generator=generator, device=device, dtype=self.wide(tensor))
            drawn[name] = part_of(noise, tensor) * (tensor != 0)
        length = self.norm(drawn.values())
        scale = self.norm(tensors.values()) / length.clamp(min=torch.finfo(length.dtype).tiny)
        return {n: (scale * d).to(tensors[n].dtype) for n, d in drawn.items()}
