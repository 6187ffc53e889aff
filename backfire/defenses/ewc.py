from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner
    from backfire.train.loop import TrainingRun


@register("ewc")
class EWC(TrainDefense):
    """Holds the weights that matter for alignment near their start (elastic weight consolidation,
    Kirkpatrick et al. 2017, arXiv:1612.00796; as the baseline in Lisa's code, arXiv:2405.18641).

    The loss term is strength * sum_i F_i (w_i - start_i)^2, without a factor of one half. F_i is
    the sum, over batches of alignment rows at the start, of the squared gradient of the batch's
    mean loss. This is not the Fisher information, whose diagonal is the mean over *examples* of the
    squared gradient, with answers drawn from the model. Because the gradient is averaged over a
    batch before squaring, examples cancel (independent ones leave about 1 / batch size), and the
    sum grows with the number of batches; so a strength is valid for one batch size and one number
    of rows only.

    Differences in Lisa's code: it continues the alignment's own adapter, runs the batches with
    dropout, and leaves the last batch's gradient in the first step. A new adapter starts with
    B = 0, where the gradient of A is zero, so that A is not held at all. Null control: the same
    total of F, spread evenly over all weights.
    """

    extra: ClassVar[Extra] = Extra(copies=2, scratch=3)
    needs_alignment: ClassVar[bool] = True

    strength: float = Field(1.0, ge=0)
    """Lambda. No published value carries over: it depends on batch size, rows and model (around 1e9
    for Lisa's 7B adapter, where the user's task is hardly learned)."""
    rows: int | None = Field(None, ge=1)
    """Number of alignment rows, from the first on, that F is computed from. Default: all (Lisa's
    code: all of its 10,000)."""

    def hook(self, run: TrainingRun) -> TrainHook:
        self.suits(aligned=bool(run.aligned), harm=True)
        return _EWCHook(self, run) if self.strength else TrainHook()


class _EWCHook(TrainHook):
    """Computes F at the start and adds the penalty."""

    def __init__(self, knobs: EWC, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        self.start = run.weights()
        self.stiffness: dict[str, Tensor] = {}

    def begin(self, inner: Inner) -> None:
        import torch

        run, size = self.run, self.run.train.batch_size
        rows = list(run.aligned[: self.knobs.rows])
        stiffness = {name: torch.zeros_like(self.start[name]) for name in run.trainable}
        for place in range(0, len(rows), size):
            inner(rows[place : place + size])
            for name, gradient in run.gradients.take().items():
                stiffness[name] += gradient.to(stiffness[name]).pow(2)
        if self.knobs.null:
            total = run.gradients.sum(f.double() for f in stiffness.values())
            even = total / sum(f.numel() for f in stiffness.values())
            stiffness = {name: torch.full_like(f, float(even)) for name, f in stiffness.items()}
        self.stiffness = stiffness

    def penalty(self, step: int) -> Tensor:
        import torch

        parts = [
            (self.stiffness[name] * (p - self.start[name]).pow(2)).sum()
            for name, p in self.run.trainable.items()
        ]
        total: Tensor = torch.stack(parts).sum()
        return total * self.knobs.strength
