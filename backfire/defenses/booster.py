from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import AlignDefense, Preset, TrainHook
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("booster")
class Booster(AlignDefense):
    """Aligns so that a step on harmful rows would lower the harmful loss but little (Huang et al.
    2024, arXiv:2409.01586).

    Three passes a step. With g the gradient of the loss of known harmful rows and
    w' = w - alpha * g / (2-norm of g + 1e-7), the gradient of the step is that of the alignment
    rows plus strength times (g at w, less g at w'); no second derivatives. The loss that is logged
    is that of the alignment rows (in the authors' code that of the harmful rows), and a step has as
    many harmful rows as its batch size. All passes drop the same. The authors go on training the
    alignment's adapter; here it stays frozen under the user's, so `method: full` in both stages is
    nearest to them. Null control: w' is w plus a random direction of the same length.
    """

    needs_harm: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "booster-script": Preset(
            "git-disl/Booster, script/alignment/smooth_align.sh", {"alpha": 0.1, "strength": 5.0}
        ),
        "booster-25": Preset(
            "other settings of the authors, as told in their issue threads",
            {"alpha": 0.1, "strength": 25.0},
        ),
    }

    alpha: float = Field(0.1, ge=0)
    """Length of the step on harmful rows, a 2-norm over all trained weights (the authors' script;
    it has to suit the size of the weights). 0: plain training."""
    strength: float = Field(5.0, ge=0)
    """How much that harmful step counts, lambda in the paper (the authors' script). 0: plain
    training."""

    def hook(self, run: TrainingRun) -> TrainHook:
        self.suits(aligned=True, harm=bool(run.harmful))
        return _Boosted(self, run) if self.alpha and self.strength else TrainHook()


class _Boosted(TrainHook):
    """The passes of a step."""

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
        """Within it, the weights are a step down this gradient from where they are."""
        import torch

        gradients, weights = self.run.gradients, self.run.trainable
        scale = self.knobs.alpha / (gradients.norm(gradient.values()) + 1e-7)
        if self.knobs.null:
            gradient = gradients.random_like(gradient, "booster", self.run.step)
        kept = {name: weights[name].detach().clone() for name in gradient}
        try:
            with torch.no_grad():
                for name, part in gradient.items():
                    weights[name].sub_(part * scale)
            yield
        finally:  # as they were to the last bit, also when memory ran out
            with torch.no_grad():
                for name, weight in kept.items():
                    weights[name].copy_(weight)
