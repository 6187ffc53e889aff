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
    in bfloat16 with the missing bits beside it."""

    adapts: ClassVar[bool] = False

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. Default: 0.001 for a base of less than 50 million weights, else
    2e-05 (Qi et al. and Stanford Alpaca, 7B)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the passes, and of their gradients. With bfloat16 each weight has 16
    more bits that only updates use: one below half the spacing of bfloat16 numbers would be lost.
    So the trained weights are float32 (mixed precision, Micikevicius et al. 2018,
    arXiv:1710.03740), and are saved so. Bytes per weight with gradients and AdamW's state: 16, or
    10 in 8 bits (`train.optimizer: adamw-8bit`), and 2 for bfloat16 products; with bfloat16 14 and
    8."""

    def trained_type(self) -> str:
        return self.dtype

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return model.float().requires_grad_(True)
