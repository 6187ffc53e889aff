from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import Method, RepairDefense
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from backfire.train.repair import Repair


@register("task-arithmetic")
class TaskArithmetic(RepairDefense):
    """Adds the alignment update again, times alpha, after fine-tuning (RESTA, Bhardwaj et al. 2024,
    arXiv:2402.11746; task arithmetic: Ilharco et al. 2022, arXiv:2212.04089).

    The vector is aligned - base, over all weights. RESTA uses aligned - unaligned, where the
    unaligned model is made by undoing the alignment, and may first drop a part of the fine-tuning
    update (DARE); neither is done here. With an adapter it requires an alignment that is also an
    adapter (`align.merge: false`), which is added to the user's, whose rank grows by its rank. Null
    control: a random vector of the same norm in each matrix (of the same rank, in an adapter).
    """

    needs_alignment: ClassVar[bool] = True

    alpha: float = Field(0.5, ge=0)
    """Multiple of the vector that is added: 0 is nothing, 1 the whole alignment update again. The
    default is ours."""

    def fits(self, method: Method, below: Method | None) -> None:
        super().fits(method, below)
        if method.adapts and below is None:
            raise UserError(
                f"{self.label()}: an adapter cannot represent an alignment of all weights; use "
                "method full, or align.method lora with align.merge false."
            )

    def repair(self, model: PreTrainedModel, start: Mapping[str, Any], tools: Repair) -> None:
        import torch

        if not self.alpha:
            return
        if hasattr(model, "peft_config"):
            self._join(model, tools)
            return
        with torch.no_grad():
            for name, weight in model.named_parameters():
                added = tools.alignment(model, start, name)
                if added is not None:
                    if self.null:
                        added = self._random(added, added.norm(), tools, name)
                    weight.add_(self.alpha * added)

    def _join(self, model: PreTrainedModel, tools: Repair) -> None:
        """Add the alignment's adapter to the user's."""
        factors = tools.aligned_factors(model)
        for name, (left, right) in factors.items():
            norm = (left @ right).norm()
            if self.null:
                left = self._random(left, left.norm(), tools, name, "left")
                right = self._random(right, right.norm(), tools, name, "right")
                right = right * (norm / (left @ right).norm().clamp(min=1e-30))
            factors[name] = left, self.alpha * right
        tools.extend(model, factors)

    def _random(self, like: Tensor, norm: Tensor, tools: Repair, *purpose: str) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(derive(tools.seed, "task-arithmetic", *purpose))
        drawn: Tensor = torch.randn(like.shape, generator=generator).to(like)
        random: Tensor = drawn * (norm / torch.linalg.vector_norm(drawn))
        return random
