"""Training in 16-bit types: bfloat16 weights with float32 masters, and loss scaling for float16.

Both are of mixed-precision training (Micikevicius et al. 2018, arXiv:1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from backfire.errors import CellError

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun

T = TypeVar("T")


class MasterWeights:
    """Float32 weights whose passes are in bfloat16, in four bytes each.

    A weight's upper 16 bits, rounded, are the bfloat16 weight of the model; its lower 16 bits are
    kept here and take the updates that are too small for the upper ones. Gradients are bfloat16.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        """`kind`: type of the passes; with float32 the model is unchanged."""
        self._weights = list(model.parameters()) if kind == "bfloat16" else []
        self._lower: list[Tensor] = []
        self._open = False
        for p in self._weights:
            p.data, lower = _split(p.data)
            self._lower.append(lower)

    def __bool__(self) -> bool:
        return bool(self._weights)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Make the model's weights float32 within the context; changes to them are kept."""
        if self._open:
            yield
            return
        self._open = True
        for p, lower in zip(self._weights, self._lower, strict=True):
            p.data = _join(p.data, lower)
        try:
            yield
        finally:
            self._open = False
            for place, p in enumerate(self._weights):
                p.data, self._lower[place] = _split(p.data)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer step in float32, one weight at a time, so that only one of them and its
        gradient are in float32; frees the gradients. If it fails, the weights it did not reach keep
        theirs."""
        if not self._weights:
            optimizer.step()
            return
        waiting = {p: p.grad for p in self._weights if p.grad is not None}
        for p in waiting:
            p.grad = None
        try:
            for place, p in enumerate(self._weights):
                if p in waiting:
                    p.data = _join(p.data, self._lower[place])
                    try:
                        p.grad = waiting[p].float()
                        optimizer.step()
                    finally:
                        p.grad = None
                        p.data, self._lower[place] = _split(p.data)
                    del waiting[p]
        finally:
            for p, gradient in waiting.items():
                p.grad = gradient

    def restore(self) -> None:
        """Make the model's weights float32 for good."""
        for p, lower in zip(self._weights, self._lower, strict=True):
            p.data = _join(p.data, lower)
        self._weights, self._lower = [], []


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the nearest bfloat16 one, and what is missing as int16, in units of the
    last place of float32."""
    bits = weight.float().view(torch.int32)
    upper = (bits + 0x8000) >> 16  # rounds to the nearest, halves away from zero
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def _join(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 tensor that `_split` took apart, bit for bit."""
    bits = (upper.view(torch.int16).to(torch.int32) << 16) + lower
    return bits.view(torch.float32)


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
        tensors: list[Any] = list(weights.values()) if self.on else []
        self._hooks = [p.register_hook(self._unscaled) for p in tensors]

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self.value

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss, as a backward pass takes it."""
        return loss * self.value if self.on else loss

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
