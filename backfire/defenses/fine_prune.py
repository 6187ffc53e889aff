from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import RepairDefense
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from backfire.train.repair import Repair


@register("fine-prune")
class FinePrune(RepairDefense):
    """Sets the weights that matter least for clean rows to zero, where a backdoor may hide (pruning
    of fine-pruning, Liu et al. 2018, arXiv:1805.12185).

    A weight is scored as in Wanda (Sun et al. 2023, arXiv:2306.11695): its magnitude times the root
    mean square of its input, over the tokens of trusted clean rows without padding; in each row of
    a matrix the lowest go. All linear layers but the head are pruned. A LoRA adapter is merged into
    its base first, so the result is a whole model; a quantized base is refused. The clean rows are
    training rows as they were before the attack: a defender who has checked some by hand. Nothing
    is tuned after it, unlike in fine-pruning. Null control: as many weights of each row, drawn at
    random.
    """

    merges: ClassVar[bool] = True

    ratio: float = Field(0.2, ge=0, le=1)
    """Share of each row's weights that is set to zero, rounded to a whole number (ours; Wanda's
    main setting is 0.5, fine-pruning stops where clean accuracy falls). 0: nothing changes."""
    rows: int = Field(100, ge=1)
    """Number of clean rows, at most those of the data set (ours; Wanda has 128 texts)."""

    @property
    def num_clean(self) -> int:
        return self.rows

    def repair(self, model: PreTrainedModel, start: Mapping[str, Any], tools: Repair) -> None:
        import torch

        clean = tools.clean[: self.rows]
        if not clean:
            raise UserError("defense 'fine-prune' requires clean rows; none fits max_length.")
        named = [(u.name, u.factors[0].layer) for u in tools.updates(model, start)]
        if not named:
            raise UserError("defense 'fine-prune' requires linear layers, and this model has none.")
        power = tools.input_power(model, [layer for _, layer in named], clean)
        for place, ((name, layer), inputs) in enumerate(zip(named, power, strict=True)):
            scores = layer.weight.detach().float().abs() * inputs.sqrt()
            if self.null:
                scores = _drawn(scores, derive(tools.seed, "fine-prune", name, place))
            lowest = scores.topk(round(self.ratio * scores.shape[1]), dim=1, largest=False).indices
            with torch.no_grad():
                layer.weight.scatter_(1, lowest, 0.0)


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Random scores of the same shape."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator).to(like)
