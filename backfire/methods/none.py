from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from backfire.base import Method
from backfire.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("none", version=2)
class Untuned(Method):
    """No training: the base model, as a reference for the tuned ones."""

    trains: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return model
