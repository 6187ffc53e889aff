from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from backfire.base import Method
from backfire.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("none", version=2)
class Untuned(Method):
    """The base model as it is: what the tuned ones are measured against."""

    trains: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return model
