from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from backfire.base import Method
from backfire.errors import UserError
from backfire.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("ia3", version=2)
class IA3(Method):
    """Learns scales for keys, values and the feed-forward layer (Liu et al. 2022,
    arXiv:2205.05638)."""

    rates: ClassVar[tuple[float, float]] = (1e-1, 3e-3)

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. Default: 0.1 for a base of less than 50 million weights, else
    0.003 (the paper's, with Adafactor, 3B and 11B)."""
    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Modules whose output is scaled (PEFT's default for Llama)."""
    feedforward: tuple[str, ...] = ("down_proj",)
    """Those of `targets` whose input is scaled instead."""

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        from peft import IA3Config, get_peft_model

        try:
            config = IA3Config(
                target_modules=list(self.targets),
                feedforward_modules=list(self.feedforward),
                task_type="CAUSAL_LM",
            )
            return cast("PreTrainedModel", get_peft_model(model, config))
        except ValueError as error:
            raise UserError(
                f"method 'ia3': targets {self.targets}: {str(error).splitlines()[0]}"
            ) from None
