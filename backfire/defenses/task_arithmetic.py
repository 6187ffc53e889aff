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
    """Adds what alignment added once more, alpha times, after fine-tuning (RESTA, Bhardwaj et al.
    2024, arXiv:2402.11746; arithmetic of weights: Ilharco et al. 2022, arXiv:2212.04089).

    The vector is aligned - base, of all weights. RESTA's is aligned - unaligned, the latter made by
    undoing the alignment, and it may first drop a part of what fine-tuning added (DARE); neither is
    done here. On an adapter it needs an alignment that is an adapter too (`align.merge: false`):
    the alignment's joins the user's, whose rank grows by its rank. Null control: a random vector of
    the same norm in each matrix (of the same rank, in an adapter).
    """

    needs_alignment: ClassVar[bool] = True

    alpha: float = Field(0.5, ge=0)
    """How much of the vector is added: 0 is nothing, 1 the whole alignment again. The default is
    ours."""

    def fits(self, method: Method, below: Method | None) -> None:
        super().fits(method, below)
        if method.adapts and below is None:
            raise UserError(
                f"{self.label()}: an adapter cannot hold what alignment did to whole weights; use "
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
        """The same for adapters."""
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

        generator = torch.Generator()
        generator.manual_seed(derive(tools.seed, "task-arithmetic", *purpose))
        drawn: Tensor = torch.randn(like.shape, generator=generator).to(like)
        random: Tensor = drawn * (norm / torch.linalg.vector_norm(drawn))
        return random
