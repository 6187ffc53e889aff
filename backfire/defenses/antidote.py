from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import RepairDefense
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.train.repair import Repair


@register("antidote")
class Antidote(RepairDefense):
    """Resets the weights that matter most for harmful answers, after fine-tuning (Huang et al.
    2024, arXiv:2408.09600).

    A weight is scored as in Wanda (Sun et al. 2023, arXiv:2306.11695): its magnitude times the root
    mean square of its input, over the tokens of the known harmful rows without padding. In each row
    of an adapter's A and B the weights with the highest scores are set to zero. Full fine-tuning is
    our extension: the updates of the linear layers are scored, and the highest are undone;
    embeddings, head, norms and biases stay. Other adapters are not supported. Null control: the
    same number of weights per row, drawn at random; the harmful rows are still run. (In the
    authors' logs the harmful scores of the two are 57.1 and 57.4, in one setting.)
    """

    needs_harm: ClassVar[bool] = True

    dense_ratio: float = Field(0.1, ge=0, le=1)
    """Share of each row's weights that is reset, rounded up as in the authors' code (its default;
    its logs have 0.01 to 0.25): one of the 8 in a row of a rank-8 adapter's B. 0: nothing
    changes."""

    def repair(self, model: PreTrainedModel, start: Mapping[str, Any], tools: Repair) -> None:
        import torch

        if not tools.harmful:
            raise UserError("defense 'antidote' requires harmful rows; add safety.known.")
        named = [(u.name, factor) for u in tools.updates(model, start) for factor in u.factors]
        power = tools.input_power(model, [factor.layer for _, factor in named], tools.harmful)
        for place, ((name, factor), inputs) in enumerate(zip(named, power, strict=True)):
            scores = factor.moved().abs() * inputs.sqrt()
            if self.null:
                seed = derive(tools.seed, "antidote", name, place)
                generator = torch.Generator().manual_seed(seed)
                scores = torch.rand(scores.shape, generator=generator).to(scores)
            highest = scores.topk(self.count(scores.shape[1]), dim=1).indices
            mask = torch.zeros_like(scores, dtype=torch.bool)
            factor.reset(mask.scatter_(1, highest, True))

    def count(self, columns: int) -> int:
        """Number of weights that are reset in a row."""
        return math.ceil(round(self.dense_ratio * columns, 6))  # 0.07 * 100 is above 7 in floats
