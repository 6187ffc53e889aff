from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import AlignDefense, Extra, Preset, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("booster")
class Booster(AlignDefense):
    """Aligns so that a later step on harmful rows lowers the harmful loss only a little (Huang et
    al. 2024, arXiv:2409.01586).

    Three passes per step. With g the gradient of the loss on known harmful rows and
    w' = w - alpha * g / (2-norm of g + 1e-7), the gradient of the step is that of the alignment
    rows plus strength times (g at w, minus g at w'), without second derivatives. The logged loss is
    that of the alignment rows (in the authors' code that of the harmful rows), and a step has
    batch_size harmful rows. All passes use the same dropout masks. The authors continue to train
    the alignment's adapter; here it stays frozen under the user's, so `method: full` in both stages
    is closest to their setup. Null control: w' is w plus a random direction of the same length.
    """

    extra: ClassVar[Extra] = Extra(copies=3, passes=2)
    joins: ClassVar[bool] = False
    needs_harm: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "booster-script": Preset(
            "git-disl/Booster, script/alignment/smooth_align.sh", {"alpha": 0.1, "strength": 5.0}
        ),
        "booster-25": Preset(
            "other settings of the authors, from their issue threads",
            {"alpha": 0.1, "strength": 25.0},
        ),
    }

    alpha: float = Field(0.1, ge=0)
    """Length of the step on harmful rows, a 2-norm over all trained weights (the authors' script;
    it depends on the size of the weights). 0: plain training."""
    strength: float = Field(5.0, ge=0)
    """Weight of the harmful term, lambda in the paper (the authors' script). 0: plain training."""

    def hook(self, run: TrainingRun) -> TrainHook:
        self.suits(aligned=True, harm=bool(run.harmful))
        return _BoosterHook(self, run) if self.alpha and self.strength else TrainHook()


class _BoosterHook(TrainHook):
    """Runs the three passes of a step."""

    def __init__(self, knobs: Booster, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        gradients, loss = self.run.gradients, inner(rows)
        aligned = gradients.take()
        harmful = self.run.draw(self.run.harmful, self.run.step, "booster")
        inner(harmful)
        here = gradients.take()
        with self.moved(here):
            inner(harmful)
        there = gradients.take()
        gradients.add(aligned)
        gradients.add({n: g - there[n] for n, g in here.items()}, self.knobs.strength)
        return loss

    @contextmanager
    def moved(self, gradient: Mapping[str, Tensor]) -> Iterator[None]:
        """Move the weights one step down this gradient within the context."""
        import torch

        gradients, weights = self.run.gradients, self.run.trainable
        scale = self.knobs.alpha / (gradients.norm(gradient.values()) + 1e-7)
        if self.knobs.null:
            gradient = gradients.random_like(gradient, "booster", self.run.step)
        with self.run.exact():
            kept = {name: weights[name].detach().clone() for name in gradient}
        try:
            with torch.no_grad(), self.run.exact():
                for name, part in gradient.items():
                    weights[name].sub_(part * scale)
            yield
        finally:  # restored bit for bit, also when memory ran out
            with torch.no_grad(), self.run.exact():
                for name, weight in kept.items():
                    weights[name].copy_(weight)
