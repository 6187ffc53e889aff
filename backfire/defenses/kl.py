from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Rendered
    from backfire.train.loop import TrainingRun


@register("kl")
class KL(TrainDefense):
    """Holds the next-token distribution near that of the starting model (KL regularization, as in
    Kaczer et al. 2025, arXiv:2508.06249).

    The loss term is strength times the mean, over the supervised tokens of the user's answers, of
    the Kullback-Leibler divergence between the two distributions over the whole vocabulary. The
    starting model is the same model with its trainable weights restored for one forward pass
    without dropout, so frozen weights are stored only once. Null control: the pass is made, but the
    tuned model is compared with itself.
    """

    extra: ClassVar[Extra] = Extra(copies=1, logits=4, forwards=1, by_row=True)

    strength: float = Field(0.1, ge=0)
    """Weight of the divergence, which is in nats per token (0.1 in two public implementations)."""
    direction: Literal["tuned-start", "start-tuned"] = "tuned-start"
    """KL(tuned || start), as in the penalty of RLHF, or KL(start || tuned), as in distillation;
    public code uses both."""

    def hook(self, run: TrainingRun) -> TrainHook:
        return _KLHook(self, run) if self.strength else TrainHook()


class _KLHook(TrainHook):
    """Adds the divergence from the starting model on the rows of the step."""

    def __init__(self, knobs: KL, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        self.start = run.weights()

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        with self.run.at(self.start):
            reference, _ = self.run.logits(rows)
        tuned = self.run.log_probabilities(logits)
        start = tuned.detach() if self.knobs.null else self.run.log_probabilities(reference)
        del reference  # as large as each of the tensors below
        one, other = (tuned, start) if self.knobs.direction == "tuned-start" else (start, tuned)
        divergence: Tensor = (one.exp() * (one - other)).sum(-1)
        return losses + self.knobs.strength * divergence * (labels >= 0)
