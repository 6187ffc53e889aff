"""Base classes of defenses, by the stage where they act, and the hooks of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from backfire.base.config import Component
from backfire.base.methods import Method
from backfire.base.rows import Row
from backfire.base.scanners import Look, Measure
from backfire.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from backfire.base.rows import Rendered

    Inner = Callable[[list[Rendered]], Tensor]


class Defense(Component):
    """Limits the harm of fine-tuning. The subclass is the stage where it acts; one per file."""

    kind: ClassVar[str] = "defenses"

    null: bool = False
    """The null control: the same compute with the effect removed (the defense's description says
    how). A defense that is no better than its null control has no effect."""

    needs_alignment: ClassVar[bool] = False
    """Whether it requires an alignment stage (`align:`), whose rows it also gets."""
    needs_harm: ClassVar[bool] = False
    """Whether it requires harmful rows known to the defender (`safety.known`)."""

    def suits(self, *, aligned: bool, harm: bool) -> None:
        """Check that the recipe has what the defense requires.

        Raises:
            UserError: it lacks an alignment stage or harmful rows.
        """
        if self.needs_alignment and not aligned:
            raise UserError(
                f"{self.label()} requires an alignment stage; add align: to the recipe."
            )
        if self.needs_harm and not harm:
            raise UserError(
                f"{self.label()} requires harmful rows known to the defender; add safety.known."
            )


class DataDefense(Defense):
    """Changes the rows before training."""

    @property
    def writes_system(self) -> bool:
        """Whether it needs the system prompts that it writes to reach the model."""
        return False

    @property
    def measures(self) -> frozenset[Measure]:
        """What the cell's base measures in the training rows for it."""
        return frozenset()

    def asking(self, look: Look) -> DataDefense:
        """This defense with access to the cell's base, which scanners with a model ask about rows.
        Most need none."""
        return self

    def filter(
        self, rows: Sequence[Row], aligned: Sequence[Row], poisoned: frozenset[str], rng: Random
    ) -> list[Row]:
        """The rows to train on; `aligned` are the rows of the alignment stage. The `poisoned` ids
        serve experiments that hold the poison constant; no real defender knows them.

        Raises:
            UserError: there are too few rows.
        """
        raise NotImplementedError

    def facts(self, rows: Sequence[Row], poisoned: frozenset[str]) -> Mapping[str, Any]:
        """Measurements of what `filter` does to these rows, for the summary of the training run;
        called after it, with the same rows."""
        return {}


@dataclass(frozen=True)
class Extra:
    """What a defense adds to training, for the prediction of memory and time."""

    copies: float = 0
    """Float32 copies of the trained weights that it keeps."""
    scratch: float = 0
    """Further such copies for a moment, outside of the passes."""
    logits: float = 0
    """Float32 tensors [row, answer, vocab] that it adds to a pass."""
    states: float = 0
    """Tensors [row, token, hidden], of the type of the matrix products, that it adds to each layer
    of a pass."""
    forwards: float = 0
    """Forward passes that it adds to a step, each over as many rows."""
    passes: float = 0
    """Forward and backward passes that it adds to a step, each over as many rows."""
    one_row: bool = False
    """Whether each row is a pass of its own."""
    by_row: bool = False
    """Whether it reads the logits as [row, answer, vocab], with padding where answers are shorter
    than the longest."""


class TrainDefense(Defense):
    """Acts in the steps of fine-tuning."""

    extra: ClassVar[Extra] = Extra()
    shards: ClassVar[bool] = True
    """Whether it works in full tuning on several devices, where each holds a part of every weight
    and gradient (a DTensor)."""
    joins: ClassVar[bool] = True
    """Whether its runs can be trained together with others, in the same passes through one base. It
    must be False if the hook has a `step` of its own or hooks modules: it would see the rows of
    other runs."""

    def hook(self, run: Any) -> TrainHook:
        """The hooks of this run, a `backfire.train.loop.TrainingRun`. Called before the first step,
        and again, on the same starting weights, when a killed run is resumed.

        Raises:
            UserError: the run lacks what the defense requires, such as an alignment stage.
        """
        raise NotImplementedError


class AlignDefense(TrainDefense):
    """Acts in the steps of the alignment stage, so that fine-tuning undoes less of it."""

    needs_alignment: ClassVar[bool] = True


class RepairDefense(Defense):
    """Changes the weights after fine-tuning."""

    merges: ClassVar[bool] = False
    """Whether it changes whole matrices: an adapter is then merged into its base first, and the
    result is a whole model."""

    @property
    def num_clean(self) -> int:
        """Number of trusted clean rows of the user's task that it requires."""
        return 0

    def fits(self, method: Method, below: Method | None) -> None:
        """Check that the result of `method` can be repaired; `below` is the method of an alignment
        whose adapter stays under the user's.

        Raises:
            UserError: it cannot.
        """
        if method.adapts and not method.stacks:
            raise UserError(
                f"{self.label()} repairs full weights and LoRA adapters, not the result of method "
                f"'{method.name}'."
            )
        if self.merges and method.quantization("cpu"):
            raise UserError(
                f"{self.label()} changes whole matrices, and those of method '{method.name}' are "
                "quantized; use method lora or full."
            )

    def repair(self, model: PreTrainedModel, start: Mapping[str, Any], tools: Any) -> None:
        """Change `model` in place. `start` holds its weights before fine-tuning, by name; `tools`
        is a `backfire.train.repair.Repair`."""
        raise NotImplementedError


class ReplyDefense(Defense):
    """Guards a model while it replies.

    It acts on greedy replies, in evaluation and in the playground, and not on likelihoods of labels
    or answers. One per cell.
    """

    needs_reference: ClassVar[bool] = False
    """Whether it compares with a second model: the one that fine-tuning started from."""

    @property
    def compares_with_twin(self) -> bool:
        """Whether the second model is the clean twin instead."""
        return False

    def guard(self, seeds: Sequence[int]) -> Guard:
        """A guard of the replies that are written together. `seeds` has one for each, which does
        not depend on the others."""
        raise NotImplementedError


class Guard:
    """Guards replies that are written together, token by token."""

    def tokens(
        self, rows: Sequence[int], own: Sequence[int], logits: Tensor, reference: Tensor | None
    ) -> list[int | None]:
        """The next token of each of these replies; None stops it.

        `rows` are the numbers of the replies that are not complete, and `own` the likeliest token
        of each, which does not end it. `logits` [row, vocab] are those of the model, `reference`
        those of the second model after the same tokens, None unless the defense needs it.
        """
        raise NotImplementedError

    def replaced(self, row: int) -> float:
        """Share of this reply's tokens that the guard replaced, 0 to 1; 1 if it stopped it."""
        raise NotImplementedError

    def text(self, row: int) -> str | None:
        """What is said instead of this reply; None if it stays."""
        return None


class TrainHook:
    """The hooks of a defense in one training run; these defaults do nothing.

    `begin` comes before the steps. A step is: `rows` selects the rows to train on; `step` computes
    their gradients, by default in one pass of `inner`; `penalty` is added to the loss; the
    optimizer updates the weights; `after` reads or changes them.
    """

    shares_prefix: ClassVar[bool] = True
    """Whether rows may share the computation of a common prefix."""
    packs: bool = True
    """Whether rows may be packed in one line; module hooks then see states [1, token, ...]."""
    knows_recomputing: ClassVar[bool] = False
    """Whether its module hooks check `run.recomputing`, so that layers may be recomputed."""

    def begin(self, inner: Inner) -> None:
        """Inspect the starting weights, before the first step and again when a killed run resumes.
        `inner(rows)` adds the gradients of their ordinary loss, without dropout."""

    def rows(self, step: int, rows: list[Rendered]) -> list[Rendered]:
        """The rows of this step (steps count from 0); `rows` are those of the user's task."""
        return rows

    def step(self, rows: list[Rendered], inner: Inner) -> Tensor:
        """Accumulate gradients in the weights and return the loss. `inner(rows)` adds the gradients
        of their ordinary loss, and may be called more than once."""
        return inner(rows)

    def weigh(
        self, losses: Tensor, labels: Tensor, rows: Sequence[Rendered], logits: Tensor
    ) -> Tensor:
        """Token losses [row, answer], reweighted or with terms added; the loop sums them and
        divides by the tokens of the step. `labels` are negative where no loss is taken; `logits`
        are [row, answer, vocab]."""
        return losses

    def penalty(self, step: int) -> Tensor | None:
        """A scalar term of the loss that depends on the weights, or None."""
        return None

    def after(self, step: int) -> None:
        """Read or change the weights after the optimizer's update in this step."""

    def summary(self) -> dict[str, float]:
        """Entries for the training summary, after the last step."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """State that a checkpoint must hold for the run to resume exactly."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from `state`."""
