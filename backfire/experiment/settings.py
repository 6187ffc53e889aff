"""Groups of settings: the model, the optimization, the alignment, the machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from backfire.base import Config, Dataset, Defense, Judge, Method
from backfire.errors import UserError
from backfire.registry import build


class Train(Config):
    """The optimization, the same for every method."""

    epochs: float = Field(2.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step. Memory may split it into micro-batches; it stays the same."""
    order: Literal["shuffled", "by-length"] = "shuffled"
    """Order of the rows, anew every epoch. `by-length` puts rows of like length into one step, as
    transformers' group_by_length does: fewer padding tokens, less mixed batches. The steps are then
    shuffled; transformers goes from the longest rows of each 50 steps to the shortest."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    final_share: float = Field(0.0, ge=0, le=1)
    """Where a cosine schedule ends, as a share of the peak learning rate."""
    warmup_share: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's decay of squared gradients."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this 2-norm."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products in training; weights that move stay float32. `auto`: bfloat16
    where the hardware multiplies in it (GPUs since 2020, CPUs with AVX512-BF16 or AMX)."""
    max_length: int = Field(512, ge=8)
    """Tokens of prompt and answer together."""
    on_long_row: Literal["fail", "skip", "cut"] = "cut"
    """What becomes of a longer row, in training and in evaluation: it is an error (`fail`), it is
    left out (`skip`), or its prompt loses its end (`cut`; where the answer alone is too long, the
    row is left out). All are counted."""

    @property
    def seen(self) -> Any:
        """How much of a row is seen, as it enters keys."""
        return self.max_length if self.on_long_row == "cut" else [self.max_length, self.on_long_row]


def component(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda spec: build(kind, spec))


def components(kind: str) -> BeforeValidator:
    """One component or several, in order; `none` is none of them."""

    def make(spec: Any) -> Any:
        items = spec if isinstance(spec, list | tuple) else [spec]
        # The null control of nothing is nothing: `defense.null` may be an axis beside `none`.
        nothing = (None, "none", {"name": "none"})
        plain = [
            {k: v for k, v in item.items() if k != "null"} if isinstance(item, dict) else item
            for item in items
        ]
        both = zip(items, plain, strict=True)
        return tuple(build(kind, item) for item, bare in both if bare not in nothing)

    return BeforeValidator(make)


def once_each(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The components, whose results are told apart by their names.

    Raises:
        UserError: there are two of one name.
    """
    names = [part.name for part in parts]
    if double := next((name for name in names if names.count(name) > 1), None):
        kind = parts[0].kind.removesuffix("s")
        raise UserError(
            f"{kind} '{double}' is given twice; run it with other knobs in another cell."
        )
    return parts


Defenses = Annotated[tuple[SerializeAsAny[Defense], ...], components("defenses")]


class Align(Config):
    """The alignment stage: the model is taught to decline before the user fine-tunes it. Defenses
    that act in it (vaccine, booster ...) stand under `defense` with all others."""

    data: SerializeAsAny[Annotated[Dataset, component("datasets")]] = Field(
        default="sandbox-policy", validate_default=True
    )  # type: ignore[assignment]
    """The rows it is taught by."""
    method: SerializeAsAny[Annotated[Method, component("methods")]] = Field(
        default="full", validate_default=True
    )  # type: ignore[assignment]
    """How it is tuned. An adapter stays a frozen adapter of its own under the user's."""
    train: Annotated[
        Train, BeforeValidator(lambda v: Train.make(v, "align.train") if isinstance(v, dict) else v)
    ] = Train()
    """Its optimization."""
    merge: bool = False
    """Add the alignment's adapter into the base before the user's is put on (Lisa's code does)."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """If not given, all cells fine-tune the model that was aligned under seed 0; but a defense that
    acts in the alignment (vaccine, booster ...) aligns a model for each seed. If given, all cells
    have that one alignment, and several seeds say nothing of how it varies."""

    def spec(self) -> dict[str, Any]:
        return {
            "data": self.data.spec(),
            "method": self.method.spec(),
            "train": self.train.changed(),
            "merge": self.merge,
            "seed": self.seed,
        }


class Safety(Config):
    """What harm is measured by, and what the defender knows of it."""

    harmful: SerializeAsAny[Annotated[Dataset, component("datasets")]] = Field(
        default="sandbox-policy", validate_default=True
    )  # type: ignore[assignment]
    """Test rows that an aligned model declines."""
    allowed: SerializeAsAny[Annotated[Dataset | None, component("datasets")]] = Field(
        default="sandbox-lookalikes", validate_default=True
    )  # type: ignore[assignment]
    """Test rows that only look like them and are to be answered."""
    known: SerializeAsAny[Annotated[Dataset, component("datasets")]] = Field(
        default={"name": "sandbox-policy", "part": "harmful", "seed": 1}, validate_default=True
    )  # type: ignore[assignment]
    """Training rows that comply with harmful requests, for defenses that learn from such."""
    judges: Annotated[tuple[SerializeAsAny[Judge], ...], components("judges")] = Field(
        default="policy", validate_default=True
    )  # type: ignore[assignment]
    """Who decides what is harmful: the first counts, others are compared with it."""

    @field_validator("judges")
    @classmethod
    def _once_each(cls, judges: tuple[Judge, ...]) -> tuple[Judge, ...]:
        if not judges:
            raise ValueError("at least one judge is needed")
        return once_each(judges)

    def spec(self) -> dict[str, Any]:
        parts = {"harmful": self.harmful, "allowed": self.allowed, "known": self.known}
        judges = [judge.spec() for judge in self.judges]
        return {**{n: d.spec() if d else None for n, d in parts.items()}, "judges": judges}

    def identity(self) -> list[Any]:
        """What is hashed: also the files behind the rows and the judges."""
        parts = (self.harmful, self.allowed, self.known, *self.judges)
        return [[part.identity(), part.fingerprint()] if part else None for part in parts]


class Evaluation(Config):
    """How replies are written."""

    max_new_tokens: int = Field(32, ge=1)
    """A reply is cut after this many tokens."""


class Machine(Config):
    """Where and how fast: never hashed. It changes a result by no more than rounding; or, where the
    method has dropout and rows are split another way, by another draw of it."""

    workers: int = Field(1, ge=1)
    """Cells worked on at once, each in a process of its own."""
    threads: int | None = Field(None, ge=1)
    """Threads per worker; the cores shared out among the workers if not given."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows per forward pass in training, at most; passes that memory has no room for are split."""
    recompute: bool = False
    """Keep each layer's input only, and run the layer again for its backward pass: a third more
    time for a small part of the memory. Rows then share no computation of a common opening."""
    eval_batch: int | None = Field(None, ge=1)
    """Rows per forward pass in evaluation, at most; 32 on a CPU and 64 on a GPU if not given. Fewer
    where they would not fit into the free memory, and half as many when memory runs out."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """How often a training run is saved, so that it can go on after a kill."""
