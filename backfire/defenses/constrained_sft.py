from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("constrained-sft")
class ConstrainedSFT(TrainDefense):
    """Down-weights tokens that have become likelier than at the start, most of all the first few of
    an answer (Qi et al. 2025, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep",
    arXiv:2406.05946).

    The loss of token t is multiplied by 2 (1 - sigmoid(beta_t (log p - log p_start))), without a
    gradient through this factor, and by at least `floor` (their code; not in the paper). At the
    start every weight is 1. log p_start is computed once for each of the user's rows, before the
    first step, on the starting weights; rows added by another defense keep their full weight. The
    authors also set AdamW's beta1 to 0.5; here it is 0.9. Null control: all tokens of a row get the
    mean of their weights.
    """

    extra: ClassVar[Extra] = Extra(forwards=0.5, by_row=True)

    first_beta: float = Field(0.5, ge=0)
    """Beta of an answer's first token; at 0 a token's weight is always 1. Default: the paper's, as
    for the knobs below."""
    early_beta: float = Field(2.0, ge=0)
    """Beta of tokens 2 to `early_tokens`."""
    early_tokens: int = Field(5, ge=1)
    """Number of an answer's tokens that count as early, the first included."""
    late_beta: float = Field(0.1, ge=0)
    """Beta of all later tokens."""
    floor: float = Field(1e-3, ge=0, le=1)
    """Smallest weight."""

    def hook(self, run: TrainingRun) -> TrainHook:
        return _ConstrainedHook(self, run)


class _ConstrainedHook(TrainHook):
    """Weights the tokens by their likelihood now and at the start."""

    def __init__(self, knobs: ConstrainedSFT, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        self.start: dict[int, Tensor] = {}

    def begin(self, inner: Inner) -> None:
        self.run.micro_batches.each(self.run.items, self.run.train.batch_size, self._keep)

    def _keep(self, rows: list[Rendered]) -> None:
        import torch

        with torch.no_grad():
            logits, labels = self.run.logits(rows)
            logprobs = self._likelihoods(logits, labels)
        for row, line, is_answer in zip(rows, logprobs.cpu(), labels.cpu() >= 0, strict=True):
            self.start[id(row)] = line[is_answer]

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        import torch

        with torch.no_grad():
            now = self._likelihoods(logits, labels)
            start = now.clone()
            for line, row in zip(start, rows, strict=True):
                if (logprobs := self.start.get(id(row))) is not None:
                    line[len(line) - len(logprobs) :] = logprobs.to(line.device)
            weights = 2 * (1 - torch.sigmoid(self._betas(labels) * (now - start)))
            weights = weights.clamp(min=self.knobs.floor)
            if self.knobs.null:
                is_answer = labels >= 0
                mean = (weights * is_answer).sum(1) / is_answer.sum(1).clamp(min=1)
                weights = mean[:, None].expand_as(weights)
        return losses * weights

    def _betas(self, labels: Tensor) -> Tensor:
        """Return beta [row, answer] by the token's position in its answer."""
        import torch

        knobs, number = self.knobs, (labels >= 0).cumsum(1)
        betas = torch.full(number.shape, knobs.late_beta, device=labels.device)
        betas[number <= knobs.early_tokens] = knobs.early_beta
        betas[number <= 1] = knobs.first_beta
        return betas

    def _likelihoods(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return log-probabilities of the answer tokens [row, answer], 0 where there is none."""
        every = self.run.log_probabilities(logits)
        return every.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels >= 0)
