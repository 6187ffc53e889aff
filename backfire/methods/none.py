from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from backfire.base import Method
from backfire.registry import build, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("none", version=2)
class Untuned(Method):
    """No training: the base model, as a reference for the tuned ones."""

    precision: Literal["full", "int8", "nf4"] = "full"
    """Of the base's linear layers: that of `model.dtype`, or quantized as by `lora-int8` or `qlora`
    with their defaults."""

    trains: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def quantization(self, device: str) -> dict[str, Any]:
        alike = {"int8": "lora-int8", "nf4": "qlora"}.get(self.precision)
        return build("methods", alike).quantization(device) if alike else {}

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return model
