"""Training in 16-bit types: float32 copies of weights, and loss scaling for float16.

Both are of mixed-precision training (Micikevicius et al. 2018, arXiv:1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from backfire.errors import CellError

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun

T = TypeVar("T")


class MasterWeights:
    """Float32 copies of a model's weights, whose passes are in a 16-bit type.

    The copies take the updates: one below half the spacing of 16-bit numbers would be lost in the
    weights themselves. The weights are the copies, rounded. Gradients are in the 16-bit type.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        """`kind`: type of the passes; with float32 there are no copies."""
        self._weights = list(model.parameters()) if kind != "float32" else []
        self._copies = [p.data for p in self._weights]
        self._open = False
        for p in self._weights:
            p.data = p.data.to(getattr(torch, kind))

    def __bool__(self) -> bool:
        return bool(self._weights)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Make the weights their float32 copies; changes to them are kept."""
        if self._open or not self._weights:
            yield
            return
        rounded = [p.data for p in self._weights]
        self._open = True
        try:
            for p, copy in zip(self._weights, self._copies, strict=True):
                p.data = copy
            yield
        finally:
            self._open = False
            for p, own in zip(self._weights, rounded, strict=True):
                own.copy_(p.data)
                p.data = own

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer step on the copies, one weight at a time, so that there is only one
        float32 gradient; frees the gradients. If it fails, the weights it did not reach keep
        theirs."""
        if not self._weights:
            optimizer.step()
            return
        waiting = {p: p.grad for p in self._weights if p.grad is not None}
        for p in waiting:
            p.grad = None
        try:
            for p, copy in zip(self._weights, self._copies, strict=True):
                if p in waiting:
                    own, p.data = p.data, copy
                    try:
                        p.grad = waiting[p].to(copy.dtype)
                        optimizer.step()
                    finally:
                        p.grad = None
                        p.data = own.copy_(copy)
                    del waiting[p]
        finally:
            for p, gradient in waiting.items():
                p.grad = gradient

    def restore(self) -> None:
        """Put the float32 copies into the model for good."""
        for p, copy in zip(self._weights, self._copies, strict=True):
            p.data = copy
        self._weights, self._copies = [], []


class LossScale:
    """Multiplies the loss by a power of two, so that small gradients do not vanish in float16.

    Gradients are divided by it as they arrive at the trained weights, so that all code sees their
    true size. A step whose gradients overflow is computed again with half the scale: no step is
    skipped. After 2,000 steps without overflow the scale doubles (as in `torch.amp.GradScaler`).
    """

    LARGEST, PATIENCE = 2.0**16, 2000

    def __init__(self) -> None:
        self.on, self.value, self.good, self.repeated = False, self.LARGEST, 0, 0
        self._hooks: list[RemovableHandle] = []

    def begin(
        self, model: PreTrainedModel, weights: Mapping[str, nn.Parameter], compute: str
    ) -> None:
        """Turn it on if passes through this model multiply in float16."""
        self.close()
        self.on = compute == "float16" or _multiplies_in_float16(model)
        self._hooks = [p.register_hook(self._unscaled) for p in weights.values() if self.on]

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self.value

    def accepts(self, norm: Tensor) -> bool:
        """Whether gradients of this norm are finite; otherwise the scale is lower from now on.

        Raises:
            CellError: they were not scaled (`nan`).
        """
        if bool(torch.isfinite(norm)):
            self.good += 1
            if self.good >= self.PATIENCE:
                self.value, self.good = self.value * 2, 0
            return True
        if self.value <= 1:
            raise CellError(
                "nan",
                "Loss or gradient is not finite in float16, whose largest number is 65,504; use "
                "train.compute bfloat16 or float32, or lower the learning rate.",
            )
        self.value, self.good, self.repeated = self.value / 2, 0, self.repeated + 1
        return False

    def state(self) -> list[float]:
        return [self.value, self.good, self.repeated]

    def load(self, state: list[float]) -> None:
        self.value, self.good, self.repeated = state[0], int(state[1]), int(state[2])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _multiplies_in_float16(model: PreTrainedModel) -> bool:
    """Whether the model's weights, or the products with quantized ones, are in float16."""
    kinds = {p.dtype for p in model.parameters()}
    kinds |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    return torch.float16 in kinds


def finite(run: TrainingRun, work: Callable[[], T]) -> T:
    """The value of `work`, which computes gradients; restarted with smaller passes when memory runs
    out, and with a lower loss scale when float16 overflows.

    Raises:
        CellError: memory runs out with one row (`oom`), or float16 overflows unscaled (`nan`).
    """
    while True:
        result = run.micro_batches.retry(work)
        if not run.scaling.on or run.scaling.accepts(run.gradients.length()):
            return result
