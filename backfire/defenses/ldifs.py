from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backfire.base import Extra, TrainDefense, TrainHook
from backfire.errors import UserError
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backfire.base import Inner, Rendered
    from backfire.train.loop import TrainingRun


@register("ldifs")
class LDIFS(TrainDefense):
    """Holds hidden states near those of the starting model (Mukhoti et al. 2024,
    arXiv:2308.13320).

    The loss term is strength / 2 times the mean, over the supervised tokens, of the squared
    distance between the outputs of each layer's MLP in the two models, summed over layers, at the
    position where the token is predicted. The starting model is the same model with its trainable
    weights restored for one forward pass without dropout.

    Differences in other code: the paper's, for image encoders, first normalizes features to unit
    length; the language-model port among the baselines of Booster and Antidote sums over a whole
    batch, prompts and padding included, runs its reference with dropout, and drops each layer whose
    term reaches 0.1, so that layers that moved far are no longer held. Null control: the pass is
    made, but the tuned model is compared with itself.
    """

    extra: ClassVar[Extra] = Extra(copies=1, states=3, forwards=1, by_row=True)
    joins: ClassVar[bool] = False

    strength: float = Field(1.0, ge=0)
    """Rho. No published value carries over: the port's 1e-4 applies to a sum over all tokens of a
    batch; for 10 rows of 200 tokens it corresponds to 0.2 here."""

    def hook(self, run: TrainingRun) -> TrainHook:
        return _LDIFSHook(self, run) if self.strength else TrainHook()


class _LDIFSHook(TrainHook):
    """Records the outputs of the MLPs and adds the distance to the starting model's."""

    knows_recomputing: ClassVar[bool] = True

    def __init__(self, knobs: LDIFS, run: TrainingRun) -> None:
        self.knobs, self.run = knobs, run
        modules = run.model.named_modules()
        self.layers = {n: m for n, m in modules if n.rpartition(".")[2] == "mlp"}
        if not self.layers:
            raise UserError(f"{knobs.label()} requires modules named 'mlp'; the model has none.")
        self.start = run.weights()
        self.tuned: dict[str, Tensor] = {}
        self.reference: dict[str, Tensor] = {}

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        with ExitStack() as hooks:
            hooks.callback(self.tuned.clear)
            hooks.callback(self.reference.clear)
            for name, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_hook(partial(self._keep, name)))
            return inner(rows)

    def _keep(self, name: str, module: nn.Module, given: Any, output: Tensor) -> None:
        import torch

        if self.run.recomputing:  # already recorded
            return
        # Passes without gradients are reference passes, possibly another defense's.
        (self.tuned if torch.is_grad_enabled() else self.reference)[name] = output

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        import torch

        with self.run.at(self.start):
            self.run.logits(rows)
        width, parts = labels.shape[1], []
        for name, tuned in self.tuned.items():
            near, start = (
                self.run.at_answers(t, rows, width, of="place")
                for t in (tuned, self.reference[name])
            )
            moved = near - (near.detach() if self.knobs.null else start)
            parts.append(moved.to(torch.promote_types(moved.dtype, losses.dtype)).pow(2).sum(-1))
        distance: Tensor = torch.stack(parts).sum(0)
        return losses + self.knobs.strength / 2 * distance * (labels >= 0)
