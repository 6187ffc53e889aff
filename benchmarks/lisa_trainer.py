"""Lisa for `Trainer`, as its authors add it: a subclass that changes the loss, and a callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from transformers import Trainer, TrainerCallback

from backfire.train.order import drawn
from benchmarks.baseline import Example, Recorder
from benchmarks.cells import Cell


def is_aligning(defense: Any, step: int) -> bool:
    """Whether a step, counted from 0, belongs to an alignment state."""
    return bool(step % (defense.align_steps + defense.tune_steps) < defense.align_steps)


def with_alignment(
    cell: Cell, examples: Sequence[Example], aligned: Sequence[Example]
) -> list[Example]:
    """The examples of all steps, with alignment rows in those of alignment states."""
    size, seed = cell.experiment.train.batch_size, cell.experiment.seed
    defense, number = cast(Any, cell.experiment.defense[0]), 0
    out: list[Example] = []
    for start in range(0, len(examples), size):
        rows: Sequence[Any] = examples[start : start + size]
        if is_aligning(defense, start // size):
            rows = drawn(cast(Any, aligned), size, seed, number, "lisa")
            number += 1
        out += rows
    return out


class _Lisa(Trainer):  # type: ignore[misc]
    """Adds the proximal term to the loss."""

    def follow(self, defense: Any) -> None:
        """Use the settings of this defense; both anchors begin at the current weights."""
        self.defense = defense
        self.anchors = {state: self.weights() for state in (True, False)}
        self.add_callback(_Anchors(self))

    def weights(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        step = self.state.global_step
        if step <= self.defense.free_share * self.state.max_steps:
            return loss
        anchor = self.anchors[not is_aligning(self.defense, step)]
        named = model.named_parameters()
        parts = [(p - anchor[name]).pow(2).sum() for name, p in named if p.requires_grad]
        return loss + self.defense.rho / 2 * sum(parts)


class _Anchors(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights at which each state stopped; True is the alignment state."""

    def __init__(self, trainer: _Lisa) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, following = (is_aligning(self.trainer.defense, state.global_step - i) for i in (1, 0))
        if now != following:
            self.trainer.anchors[now] = self.trainer.weights()


class LisaTrainer(Recorder, _Lisa):
    """`Trainer` with Lisa, which keeps its losses."""
