"""The base and the tuned model, of which one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from backfire import pipeline
from backfire.base import Need, Row, Sample, Template
from backfire.data.limits import read_limits
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.evaluate.score import sample, score_rows
from backfire.experiment import Model
from backfire.model.resident import Source
from backfire.model.source import adapter_folder, pin
from backfire.pipeline import Context
from backfire.progress import within
from backfire.registry import build
from backfire.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 1024
"""Most tokens of a row, if the model has no lower limit."""
T = TypeVar("T")


@dataclass(frozen=True)
class Both(Generic[T]):
    """The same of the base and of the tuned model."""

    base: T
    tuned: T


@dataclass
class Pair:
    """The base and the tuned model, and how both read a row."""

    base: Source
    tuned: Source
    """Where the tuned model's weights are; for an adapter, those below it."""
    adapter: Path | None
    renderer: Renderer
    context: Context
    system: str = ""
    """The user's own system prompt, for all rows."""
    below: Model = field(default_factory=Model)
    """The tuned model without its adapter."""
    long_rows: dict[str, int] = field(default_factory=dict)
    """Rows left out since they are too long, by what they are."""

    def each(self, work: Callable[[PreTrainedModel], T]) -> Both[T]:
        """What `work` makes of both models; the one that is in memory comes first."""
        loaded = self.context.resident.holds(self.tuned, self.adapter)
        if loaded:
            tuned = work(self.load_tuned())
            return Both(work(self.load_base()), tuned)
        base = work(self.load_base())
        return Both(base, work(self.load_tuned()))

    def load_base(self) -> PreTrainedModel:
        """The base; valid until the other is loaded."""
        return self.context.resident.model(self.base)

    def load_tuned(self) -> PreTrainedModel:
        """The tuned model; valid until the other is loaded."""
        return self.context.resident.model(self.tuned, self.adapter)

    def asked(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the user's system prompt."""
        return [replace(row, system=self.system) for row in rows] if self.system else list(rows)

    def answer(
        self, rows: Sequence[Row], needs: Sequence[Need], most: int, what: str
    ) -> Both[list[Sample]]:
        """Samples of both models on these rows, with replies of at most `most` tokens.

        Raises:
            UserError: no row fits.
        """
        kept, left = self.fitting(rows, most)
        if rows and not kept:
            reply = f" with a reply of {most} tokens" if most else ""
            raise UserError(f"None of the {what} fits into {self.room}{reply}; give shorter ones.")
        if left:
            self.long_rows[what] = left
        return self.each(lambda model: self.samples(model, kept, needs, most, what))

    def samples(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        needs: Sequence[Need],
        most: int,
        what: str,
    ) -> list[Sample]:
        """Samples of one model."""
        lines = score_rows(
            needs,
            model,
            self.renderer,
            rows,
            max_new_tokens=most,
            batch_size=self.context.machine.eval_batch,
            progress=within(what, self.context.progress),
        )
        return [sample(row, "clean", None, one) for row, one in zip(rows, lines, strict=True)]

    def fitting(self, rows: Sequence[Row], most: int) -> tuple[list[Row], int]:
        """The rows that fit into `room` with a reply, and how many do not."""
        items, left = self.renderer.sift(self.asked(rows), empty=True)
        limits = self.renderer.limits
        kept = [item.row for item in items if limits.has_room(item.prompt_ids, most)]
        return kept, len(left) + len(items) - len(kept)

    @property
    def room(self) -> str:
        """The tokens that a row may have, in words."""
        positions = self.renderer.limits.positions
        if positions is not None and positions <= LONGEST:
            return f"the model's {positions:,} positions"
        return f"the {LONGEST:,} tokens that an audit reads of a row"


def open_pair(model: str, base: str, adapter: str | None, template: Any, context: Context) -> Pair:
    """Find both models and check that one was made from the other. `template` is a name, or a
    mapping with knobs; None is the tuned model's own chat template if it has one.

    Raises:
        UserError: one is missing, an adapter does not fit, or the architectures differ.
    """
    from backfire.model.load import dtype_of, is_adapter

    below = base
    if adapter is None and is_adapter(Path(model).expanduser()):
        adapter = str(Path(model).expanduser())
    elif adapter is not None or model != base:
        below = model
    start = pin(Model.make({"name": base}, "--base"))
    settings = {"name": below, **({"adapter": adapter} if adapter else {})}
    whole = pin(Model.make(settings, "MODEL"))
    if whole == start:
        raise UserError(f"{model} is the base itself; name a tuned model, or --adapter.")
    plain = whole.model_copy(update={"adapter": None, "adapter_revision": None})
    folders = [pipeline.base(one, context) for one in (start, plain)]
    for one in (start, whole):
        pipeline.check_weights(one, context)
    if folders[0] != folders[1]:
        _check_alike(model, *folders)
    device = context.device
    untuned, tuned = (
        Source(folder, dtype_of(one, device), device)
        for folder, one in zip(folders, (start, whole), strict=True)
    )
    placed = adapter_folder(whole) if whole.adapter else None
    shown = _renderer(folders[1], template)
    return Pair(untuned, tuned, placed, shown, context, below=plain)


def _check_alike(model: str, base: Path, tuned: Path) -> None:
    """Check that two models have the same weights by name and shape.

    Raises:
        UserError: they do not.
    """
    from backfire.model.load import skeleton

    ours, theirs = (
        {name: tuple(w.shape) for name, w in skeleton(folder).named_parameters()}
        for folder in (base, tuned)
    )
    theirs = {name: shape for name, shape in theirs.items() if name in ours or "head" not in name}
    for name, shape in theirs.items():
        if ours.get(name) != shape:
            has = f"{list(ours[name])} in the base" if name in ours else "missing in the base"
            raise UserError(
                f"{model} was not tuned from this base: {name} has shape {list(shape)}, {has}."
            )
    if missing := sorted(name for name in set(ours) - set(theirs) if "head" not in name):
        raise UserError(f"{model} was not tuned from this base: it has no {missing[0]}.")


def _renderer(folder: Path, template: Any) -> Renderer:
    """How rows are rendered; by the model's own chat template if it has one."""
    tokenizer, limits = load_tokenizer(folder), read_limits(folder)
    default = "chat" if tokenizer.chat_template else "raw"
    chosen: Template = build("templates", default if template is None else template)
    longest = min(limits.positions or LONGEST, LONGEST)
    return Renderer(chosen, tokenizer, longest, on_long_row="skip", limits=limits)
