from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from backfire.base import TrainDefense, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("constrained-sft")
class ConstrainedSFT(TrainDefense):
    """Tokens already likelier than at the start weigh less, above all an answer's first few (Qi et
    al. 2025, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", arXiv:2406.05946).

    The loss of token t is multiplied by 2 (1 - sigmoid(beta_t (log p - log p_start))), through
    which no gradient flows, and by no less than `floor` (their code; not in the paper). At the
    start every weight is 1. log p_start is computed once for each of the user's rows, before the
    first step, on the starting weights; rows that another defense puts in are learned in full.
    Their recipe also has AdamW's beta1 at 0.5, here it is 0.9. Null control: each row's tokens all
    get the mean of their weights.
    """

    first_beta: float = Field(0.5, ge=0)
    """Beta of an answer's first token; at 0 a token's weight is 1 throughout. The paper's, as are
    those below."""
    early_beta: float = Field(2.0, ge=0)
    """Beta of the tokens after the first, up to number `early_tokens`."""
    early_tokens: int = Field(5, ge=1)
    """How many tokens of an answer count as early, the first included."""
    late_beta: float = Field(0.1, ge=0)
    """Beta of all tokens after those."""
    floor: float = Field(1e-3, ge=0, le=1)
    """The smallest weight."""

    def hook(self, run: TrainingRun) -> TrainHook:
        return _Weights(self, run)


class _Weights(TrainHook):
    """Knows how likely each answer was at the start."""

    def __init__(self, knobs: ConstrainedSFT, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        self.start: dict[int, Tensor] = {}

    def begin(self, inner: Inner) -> None:
        self.run.micro_batches.each(self.run.items, self.run.train.batch_size, self._keep)

    def _keep(self, rows: list[Rendered]) -> None:
        import torch

        with torch.no_grad():
            logits, labels = self.run.logits(rows)
            found = _log_probabilities(logits, labels)
        for row, line, said in zip(rows, found.cpu(), labels.cpu() >= 0, strict=True):
            self.start[id(row)] = line[said]

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        import torch

        with torch.no_grad():
            now = _log_probabilities(logits, labels)
            start = now.clone()
            for line, row in zip(start, rows, strict=True):
                if (known := self.start.get(id(row))) is not None:
                    line[len(line) - len(known) :] = known.to(line.device)
            weights = 2 * (1 - torch.sigmoid(self._betas(labels) * (now - start)))
            weights = weights.clamp(min=self.knobs.floor)
            if self.knobs.null:
                said = labels >= 0
                mean = (weights * said).sum(1) / said.sum(1).clamp(min=1)
                weights = mean[:, None].expand_as(weights)
        return losses * weights

    def _betas(self, labels: Tensor) -> Tensor:
        """Beta [row, answer] by the token's number in its own answer."""
        import torch

        knobs, number = self.knobs, (labels >= 0).cumsum(1)
        betas = torch.full(number.shape, knobs.late_beta, device=labels.device)
        betas[number <= knobs.early_tokens] = knobs.early_beta
        betas[number <= 1] = knobs.first_beta
        return betas


def _log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the tokens that were to be said [row, answer], 0 where there is none."""
    import torch

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    said: Tensor = wide.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return said * (labels >= 0)
