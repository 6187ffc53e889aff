"""Base classes of defenses, by where they act, and the hooks of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from backfire.base.config import Component
from backfire.base.methods import Method
from backfire.base.rows import Row
from backfire.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from backfire.base.rows import Rendered

    Inner = Callable[[list[Rendered]], Tensor]


class Defense(Component):
    """Keeps fine-tuning from doing harm. Where it acts is its subclass; a file holds one."""

    kind: ClassVar[str] = "defenses"

    null: bool = False
    """The null control: the same compute with the effect taken out (how, its description says). A
    defense that is no better than its null control does nothing of its own."""

    needs_alignment: ClassVar[bool] = False
    """Whether it stands on an alignment stage (`align:`), whose rows it also gets."""
    needs_harm: ClassVar[bool] = False
    """Whether it needs harmful rows that the defender knows (`safety.known`)."""

    def suits(self, *, aligned: bool, harm: bool) -> None:
        """Raises:
        UserError: the recipe lacks what the defense stands on.
        """
        if self.needs_alignment and not aligned:
            raise UserError(
                f"{self.label()} stands on an alignment stage; add align: to the recipe."
            )
        if self.needs_harm and not harm:
            raise UserError(
                f"{self.label()} needs harmful rows known to the defender; add safety.known."
            )


class DataDefense(Defense):
    """Changes the rows before anything is trained."""

    def filter(
        self, rows: Sequence[Row], aligned: Sequence[Row], poisoned: frozenset[str], rng: Random
    ) -> list[Row]:
        """The rows to train on, `aligned` being those of the alignment stage. `poisoned` ids are
        given for experiments that hold the poison constant; no real defender knows them.

        Raises:
            UserError: there are too few rows.
        """
        raise NotImplementedError


class TrainDefense(Defense):
    """Takes part in the steps of fine-tuning."""

    def hook(self, run: Any) -> TrainHook:
        """The hooks of this run, a `backfire.train.loop.TrainingRun`. Called before the first step,
        and again, on the same starting weights, when a killed run is resumed.

        Raises:
            UserError: the run lacks what the defense stands on, such as an alignment stage.
        """
        raise NotImplementedError


class AlignDefense(TrainDefense):
    """Takes part in the steps of the alignment stage, so that fine-tuning undoes less of it."""

    needs_alignment: ClassVar[bool] = True


class RepairDefense(Defense):
    """Changes the weights after fine-tuning."""

    def fits(self, method: Method, below: Method | None) -> None:
        """`below` is the method of an alignment whose adapter stays under the user's.

        Raises:
            UserError: what this method leaves cannot be repaired.
        """
        if method.adapts and not method.stacks:
            raise UserError(
                f"{self.label()} repairs whole weights and LoRA adapters, not what method "
                f"'{method.name}' leaves."
            )

    def repair(self, model: PreTrainedModel, start: Mapping[str, Any], tools: Any) -> None:
        """Change `model` in place. `start` holds its weights before fine-tuning, by name; `tools`
        is a `backfire.train.repair.Repair`."""
        raise NotImplementedError


class TrainHook:
    """A defense at work in one training run; here, one that does nothing.

    `begin` comes before the steps. A step is: `rows` chooses what is trained on; `step` gets their
    gradients, by default in one pass of `inner`; `penalty` is added; the optimizer moves the
    weights; `after` looks at them.
    """

    shares_prefix: ClassVar[bool] = True
    """Whether rows may share the computation of a common opening."""
    knows_recomputing: ClassVar[bool] = False
    """Whether its hooks on modules ask `run.recomputing`, so that layers may be run again."""

    def begin(self, inner: Inner) -> None:
        """Look at the starting weights, before the first step and again when a killed run goes on.
        `inner(rows)` adds the gradients of their ordinary loss, without dropout."""

    def rows(self, step: int, rows: list[Rendered]) -> list[Rendered]:
        """The rows of this step, counted from 0; `rows` are those of the user's task."""
        return rows

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        """Leave gradients in the weights and return the loss. `inner(rows)` adds the gradients of
        their ordinary loss, and may be called more than once."""
        return inner(rows)

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        """Token losses [row, answer], weighed or with something added; they are summed and divided
        by the tokens of the step. `labels` are below zero where nothing is learned; `logits` are
        [row, answer, vocab]."""
        return losses

    def penalty(self, step: int) -> Tensor | None:
        """What is added to the loss, a scalar that depends on the weights; None: nothing."""
        return None

    def after(self, step: int) -> None:
        """Look at the weights after the optimizer moved them in this step."""

    def summary(self) -> dict[str, float]:
        """What the training summary says of it, once the last step is done."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for the run to go on as if never stopped."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
