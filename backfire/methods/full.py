from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import Method
from backfire.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("full", version=2)
class Full(Method):
    """Trains all weights, in float32 (as in Qi et al. 2024, arXiv:2310.03693)."""

    adapts: ClassVar[bool] = False

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. Default: 0.001 for a base of less than 50 million weights, else
    2e-05 (Qi et al. and Stanford Alpaca, 7B)."""

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        # Small updates vanish in bfloat16 weights; the forward pass may still run in it.
        return model.float().requires_grad_(True)
