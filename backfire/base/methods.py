"""Base class of fine-tuning methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from backfire.base.config import Component

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGE = 50_000_000
"""Weights of a base from which on the published learning rates are the default: between the largest
that people make for tests and the smallest that they publish for use."""


class Method(Component):
    """How the model is tuned: which weights move."""

    kind: ClassVar[str] = "methods"
    trains: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    """Whether the result can be written as plain weights of the base's shape."""
    adapts: ClassVar[bool] = True
    """Whether the result is an adapter beside the base's weights."""
    stacks: ClassVar[bool] = False
    """Whether `attach` can put its adapter on a model that has a frozen one already."""

    rates: ClassVar[tuple[float, float]] = (1e-3, 2e-5)
    """The default learning rate below `LARGE` weights of the base, and from there on."""

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. A knob of the method, since what suits one is tenfold off for
    another; if not given, it follows the size of the base."""

    def rate_for(self, num_weights: int | None) -> float:
        """The learning rate on a base of that many weights; one of unknown size counts as large."""
        if self.learning_rate is not None:
            return self.learning_rate
        small, large = self.rates
        return small if num_weights is not None and num_weights < LARGE else large

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The model with its trainable weights marked (`requires_grad`); may wrap or change it."""
        raise NotImplementedError

    def quantization(self, device: str) -> dict[str, Any]:
        """Arguments of transformers' `BitsAndBytesConfig` for the frozen base on a `cpu` or `cuda`
        device; empty: the base is loaded as it is."""
        return {}

    def settled(self, device: str) -> Self:
        """The same with what is left to the device, `cpu` or `cuda`, decided."""
        return self

    def paged(self) -> bool:
        """Whether the optimizer's state may move to main memory, on a GPU that is short of it."""
        return False
