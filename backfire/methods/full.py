from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from backfire.base import Method
from backfire.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("full", version=2)
class Full(Method):
    """Trains all weights, in float32 (as in Qi et al. 2024, arXiv:2310.03693) or, to save memory,
    in bfloat16 with a float32 copy that takes the updates."""

    adapts: ClassVar[bool] = False

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. Default: 0.001 for a base of less than 50 million weights, else
    2e-05 (Qi et al. and Stanford Alpaca, 7B)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the passes, and of their gradients. With bfloat16 an update goes to a
    float32 copy of the weights (Micikevicius et al. 2018, arXiv:1710.03740), since one below half
    the spacing of bfloat16 numbers would be lost; the passes see it rounded, and the saved model is
    the float32 copy. Bytes per weight with AdamW: 16 for both types, where bfloat16 keeps 8 of them
    (weights and gradients 4, copy 4) and AdamW 8; with `train.optimizer: adamw-8bit` 10 instead of
    16."""

    def trained_type(self) -> str:
        return self.dtype

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return model.float().requires_grad_(True)
