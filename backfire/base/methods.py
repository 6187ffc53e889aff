"""Base class of fine-tuning methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from backfire.base.config import Component

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGE = 50_000_000
"""Number of weights from which the published learning rates are the default: larger than the models
made for tests, smaller than those published for use."""


class Method(Component):
    """How the model is fine-tuned: which weights are trained."""

    kind: ClassVar[str] = "methods"
    trains: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    """Whether the result can be written as plain weights of the base's shape."""
    adapts: ClassVar[bool] = True
    """Whether the result is an adapter, separate from the base's weights."""
    stacks: ClassVar[bool] = False
    """Whether `attach` can add its adapter to a model that already has a frozen one."""

    rates: ClassVar[tuple[float, float]] = (1e-3, 2e-5)
    """Default learning rates: for a base with fewer than `LARGE` weights, and for larger ones."""

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. A setting of the method, since good values differ tenfold between
    methods; the default depends on the size of the base."""

    def rate_for(self, num_weights: int | None) -> float:
        """The learning rate for a base with this many weights; unknown size (None) is large."""
        if self.learning_rate is not None:
            return self.learning_rate
        small, large = self.rates
        return small if num_weights is not None and num_weights < LARGE else large

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The model with its trainable weights marked (`requires_grad`); may wrap or modify it."""
        raise NotImplementedError

    def quantization(self, device: str) -> dict[str, Any]:
        """Arguments of transformers' `BitsAndBytesConfig` for the frozen base on a `cpu` or `cuda`
        device; empty if the base is not quantized."""
        return {}

    def resolved(self, device: str, compute: str = "bfloat16") -> Self:
        """A copy with the knobs that depend on the device (`cpu` or `cuda`), and on the type in
        which a GPU multiplies fastest, resolved."""
        return self

    def joins(self) -> bool:
        """Whether several of its runs can be trained in the same passes through one base: nothing
        is trained but LoRA's A and B beside frozen linear layers, and nothing is drawn."""
        return False

    def trained_type(self) -> str:
        """Type of the trained weights in the passes; if it has 16 bits, updates go to float32
        copies of them."""
        return "float32"

    def paged(self) -> bool:
        """Whether the optimizer state may be paged to main memory when a GPU runs short."""
        return False
