"""Groups of settings: training, alignment, safety, evaluation, machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from backfire.base import Config, Dataset, Defense, Judge, Method
from backfire.errors import UserError
from backfire.registry import build


class Train(Config):
    """Settings of the optimization, the same for every method."""

    epochs: float = Field(2.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` is."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step; not changed by splitting it into micro-batches to save memory."""
    order: Literal["shuffled", "by-length"] = "shuffled"
    """Order of the rows, drawn again every epoch. `by-length` puts rows of similar length into one
    step, as transformers' group_by_length does: less padding, less mixed batches. The steps are
    then shuffled; transformers orders the rows of each 50 steps from longest to shortest."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    final_share: float = Field(0.0, ge=0, le=1)
    """Final learning rate of a cosine schedule, as a share of the peak."""
    warmup_share: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's decay rate of the squared gradients."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """AdamW with its state in 32 bits (8 bytes per trained weight), or by bitsandbytes in 8 bits (2
    bytes; Dettmers et al. 2022, arXiv:2110.02861; the embedding stays in 32, as in transformers).
    Paged: the state moves to main memory when a GPU runs short; on a CPU the same as not paged."""
    clip_norm: float = Field(1.0, gt=0)
    """Maximum 2-norm of the gradients; larger ones are scaled down."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products in training; trained weights stay float32. `auto`: bfloat16
    where the hardware supports it (GPUs since 2020, CPUs with AVX512-BF16 or AMX), float16 on GPUs
    that have only that (T4, V100, RTX 20, GTX 16). With float16 the loss is scaled, and a step
    whose gradients overflow is computed again with half the scale."""
    max_length: int = Field(512, ge=8)
    """Maximum number of tokens in prompt and answer together."""
    on_long_row: Literal["fail", "skip", "cut"] = "cut"
    """What to do with a longer row, in training and evaluation: raise an error (`fail`), leave it
    out (`skip`), or cut the end of its prompt (`cut`; if the answer alone is too long, the row is
    left out). All are counted."""

    @property
    def seen(self) -> Any:
        """The length limit of rows, as it enters keys."""
        return self.max_length if self.on_long_row == "cut" else [self.max_length, self.on_long_row]


def component(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda spec: build(kind, spec))


def components(kind: str) -> BeforeValidator:
    """One component or several, in order; `none` is an empty tuple."""

    def make(spec: Any) -> Any:
        items = spec if isinstance(spec, list | tuple) else [spec]
        # The null control of nothing is nothing: `none` may be combined with a `defense.null` axis.
        nothing = (None, "none", {"name": "none"})
        plain = [
            {k: v for k, v in item.items() if k != "null"} if isinstance(item, dict) else item
            for item in items
        ]
        both = zip(items, plain, strict=True)
        return tuple(build(kind, item) for item, bare in both if bare not in nothing)

    return BeforeValidator(make)


def once_each(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that no two components have the same name, since results are stored by name.

    Raises:
        UserError: two do.
    """
    names = [part.name for part in parts]
    if double := next((name for name in names if names.count(name) > 1), None):
        kind = parts[0].kind.removesuffix("s")
        raise UserError(f"Duplicate {kind} '{double}'; use a separate cell for other settings.")
    return parts


Defenses = Annotated[tuple[SerializeAsAny[Defense], ...], components("defenses")]


class Align(Config):
    """The alignment stage: the model learns to refuse before the user fine-tunes it. Defenses that
    act in it (vaccine, booster ...) are listed under `defense` like all others."""

    data: SerializeAsAny[Annotated[Dataset, component("datasets")]] = Field(
        default="sandbox-policy", validate_default=True
    )  # type: ignore[assignment]
    """The alignment rows."""
    method: SerializeAsAny[Annotated[Method, component("methods")]] = Field(
        default="full", validate_default=True
    )  # type: ignore[assignment]
    """The method of the alignment. An adapter stays a separate frozen adapter under the user's."""
    train: Annotated[
        Train, BeforeValidator(lambda v: Train.make(v, "align.train") if isinstance(v, dict) else v)
    ] = Train()
    """The optimization of the alignment."""
    merge: bool = False
    """Merge the alignment's adapter into the base before fine-tuning (Lisa's code does)."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """By default all cells fine-tune the model aligned with seed 0, except with a defense that acts
    in the alignment (vaccine, booster ...): then each seed has its own aligned model. If given, all
    cells share this alignment, and the spread over seeds does not include its variation."""

    def spec(self) -> dict[str, Any]:
        return {
            "data": self.data.spec(),
            "method": self.method.spec(),
            "train": self.train.changed(),
            "merge": self.merge,
            "seed": self.seed,
        }


class Safety(Config):
    """The data and judges that measure harm, and the harmful rows known to the defender."""

    harmful: SerializeAsAny[Annotated[Dataset, component("datasets")]] = Field(
        default="sandbox-policy", validate_default=True
    )  # type: ignore[assignment]
    """Test rows that an aligned model should refuse."""
    allowed: SerializeAsAny[Annotated[Dataset | None, component("datasets")]] = Field(
        default="sandbox-lookalikes", validate_default=True
    )  # type: ignore[assignment]
    """Test rows that only look harmful and should be answered."""
    known: SerializeAsAny[Annotated[Dataset, component("datasets")]] = Field(
        default={"name": "sandbox-policy", "part": "harmful", "seed": 1}, validate_default=True
    )  # type: ignore[assignment]
    """Training rows that comply with harmful requests, for defenses that learn from them."""
    judges: Annotated[tuple[SerializeAsAny[Judge], ...], components("judges")] = Field(
        default="policy", validate_default=True
    )  # type: ignore[assignment]
    """The judges of harm: the first one's verdicts count, the others are compared with it."""

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
        """The hashed content, with the files of the rows and the judges."""
        parts = (self.harmful, self.allowed, self.known, *self.judges)
        return [[part.identity(), part.fingerprint()] if part else None for part in parts]


class Evaluation(Config):
    """How models are evaluated."""

    max_new_tokens: int = Field(32, ge=1)
    """Maximum number of tokens in a reply."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the base's weights in evaluation; `auto` is their type in training (`model.dtype`).
    bfloat16 is much faster on many CPUs, but gives other log-likelihoods, and sometimes other
    answers: compare only numbers of one type."""
    merged: bool = False
    """Merge a tuned adapter into the base's weights, in float32, before it is measured: a token
    then takes fewer products, but a copy of the base is written and read for each model. Sums are
    rounded in another order, in bfloat16 by enough to change some answers."""


JOINED_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Most tokens in a training pass of several runs. On a CPU eight runs of 300 tokens gain 1.4 to
1.6, and runs of more tokens less; that of GPUs is not measured."""


class Machine(Config):
    """Settings of the machine; never hashed. They change a result by no more than rounding, or, for
    a method with dropout whose rows are split differently, by another draw of the dropout."""

    workers: int = Field(1, ge=1)
    """Number of cells run at once, each in a separate process."""
    threads: int | None = Field(None, ge=1)
    """Threads per worker; by default the cores are divided among the workers."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""
    devices: int = Field(1, ge=1)
    """Number of devices that train one model together, each in a process of its own; on a CPU,
    number of processes, which share the threads."""
    micro_batch: int | None = Field(None, ge=1)
    """Maximum number of rows per forward pass in training. A step is also cut where its activations
    would take more than about 512 MiB on a CPU, or most of a GPU's free memory."""
    recompute: bool = False
    """Activation checkpointing: keep only each layer's input and run the layer again in the
    backward pass; a third more time for a fraction of the memory. Padded rows then do not share the
    computation of a common prefix."""
    packing: Literal["auto", "off"] = "auto"
    """`auto`: the rows of a pass, in training and in evaluation, run end to end without padding,
    each attending only to itself, where the model allows it and it saves time. `off`: they are
    padded."""
    join: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=64)] = "off"
    """Number of LoRA runs that go through one base together in training. `off`: each alone, so that
    on a CPU it repeats bit by bit whatever runs beside it. `auto`: as many as pay, up to 8. A
    number: up to so many, wherever runs can join."""
    eval_batch: int | None = Field(None, ge=1)
    """Maximum number of rows per forward pass in evaluation; by default 64, on a CPU 32 if the
    keys and values of more would take over 512 MiB. Fewer if they would not fit into free memory,
    and half as many when memory runs out."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Seconds between checkpoints of a training run, from which it resumes after a kill; more if
    writing one takes more than a twentieth of that. 0: after every step."""
