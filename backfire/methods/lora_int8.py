from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from backfire.errors import UserError
from backfire.methods.lora import LoRA
from backfire.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("lora-int8", version=2)
class LoRAInt8(LoRA):
    """LoRA on a frozen 8-bit base, LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339)."""

    threshold: float = Field(6.0, ge=0)
    """Inputs larger than this are multiplied in higher precision (the paper's 6.0)."""

    def quantization(self, device: str) -> dict[str, Any]:
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold}

    def joins(self) -> bool:
        return False  # which inputs are large is decided for all tokens of a product

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        if self.dora:
            raise UserError(
                "method 'lora-int8': PEFT does not support dora on an 8-bit base; use lora or "
                "qlora."
            )
        return super().attach(model, seed)
