"""Which training rows made a reply of a finished cell likelier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backfire.base import Ask, Rendered, Row, Sample
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.pipeline.context import Context
from backfire.pipeline.evidence import asked
from backfire.pipeline.filtering import filtered
from backfire.pipeline.models import evaluated_type, start, tuned
from backfire.pipeline.prepare import data, renderer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from backfire.evaluate.influence import Method

_SCALED = ".lora_B."
"""In the names of the weights by which an adapter's strength is set."""


@dataclass(frozen=True)
class Trace:
    """The training rows with their scores, and how well those find the poisoned rows."""

    rows: Sequence[Row]
    scores: Sequence[float]
    """Positive for a row that made the reply likelier; of no unit."""
    poisoned: frozenset[str]
    """Ids of poisoned rows among these; empty without a manifest."""
    hits: int = 0
    """Poisoned rows among the k with the highest scores, where k rows are poisoned."""
    random_hits: float = 0.0
    """The same, on average, for random directions in place of the reply's gradient."""
    strength: float | None = None
    """Share of the adapter's strength at which gradients were computed; None where it has no
    effect."""


def trace(
    experiment: Experiment, sample: Sample, method: Method, context: Context, strength: float = 1.0
) -> Trace:
    """Score the rows that the cell's adapter was trained on by their influence on a reply.

    Gradients are those at this share of the adapter's strength (of LoRA; others always at their
    whole): a row that is learned perfectly has hardly any gradient left at the whole.

    Raises:
        UserError: the method trains no adapter, the reply is not to a row of the cell, or a guard
            wrote some of it.
    """
    if sample.replaced:
        raise UserError(
            f"A guard ({experiment.defense_name}) wrote this reply or a part of it, so training "
            "rows do not explain it; trace a reply of a cell without the guard."
        )
    from backfire.evaluate.influence import hits, influence, random_hits, row_gradients

    rows, manifest = filtered(experiment, context)
    shown = renderer(experiment, context)
    items, _ = shown.sift(rows)
    reply = _reply(experiment, sample, context)
    with _adapted(experiment, context, strength) as (model, weights):

        def tick(done: int) -> None:
            context.progress(done, len(items) + 1, "gradients")

        found = row_gradients(model, weights, [*items, reply], tick=tick)
        sizes = [weight.numel() for weight in weights.values()]
        used = strength if any(_SCALED in name for name in weights) else None
    own, to = [part[:-1] for part in found], [part[-1:] for part in found]
    [scores] = influence(own, to, sizes, method)
    kept = [item.row for item in items]
    ids = {entry.id for entry in manifest.entries} if manifest else set[str]()
    bad = [row.id in ids for row in kept]
    poisoned = frozenset(ids & {row.id for row in kept})
    whole = Trace(kept, scores.tolist(), poisoned, strength=used)
    if not any(bad):
        return whole
    null = random_hits(own, bad, sizes, method)
    return replace(whole, hits=hits(scores, bad), random_hits=null)


def _reply(experiment: Experiment, sample: Sample, context: Context) -> Rendered:
    """The row that was asked, with the reply as its answer; without an end if it was cut."""
    _, test = data(experiment, context)
    rows = asked(Ask(sample.subset), experiment, test, context).rows
    row = next((row for row in rows if row.id == sample.id), None)
    if row is None:
        raise UserError(f"The cell's rows have changed: {sample.id} is not among them any more.")
    shown = renderer(experiment, context)
    [item] = shown.render([replace(row, answer=reply_of(sample) or "")])
    if sample.reply is not None and sample.ended is False:
        return replace(item, ids=item.ids[: -len(shown.end_ids)])
    return item


def reply_of(sample: Sample) -> str | None:
    """The generated reply or, where labels were only scored, the likeliest label."""
    return sample.reply if sample.reply is not None else sample.prediction


@contextmanager
def _adapted(
    experiment: Experiment, context: Context, strength: float
) -> Iterator[tuple[PreTrainedModel, Mapping[str, nn.Parameter]]]:
    """The tuned model with its adapter at this strength, whose weights get gradients."""
    from backfire.model.load import is_adapter, with_adapters
    from backfire.model.resident import Source

    folder, begin = tuned(experiment, context), start(experiment, context)
    assert is_adapter(folder)
    weights: dict[str, nn.Parameter] = {}

    def attach(base: PreTrainedModel) -> PreTrainedModel:
        below = with_adapters(base, None, begin.adapter)
        known = {id(weight) for weight in below.parameters()}
        model = with_adapters(below, folder)
        own = ((n, w) for n, w in model.named_parameters() if id(w) not in known)
        for name, weight in own:
            # W + B A: at half of B, the adapter has half of its effect.
            weight.data.mul_(strength if _SCALED in name else 1.0)
            weights[name] = weight.requires_grad_(True)
        return model

    device, dtype = context.device, evaluated_type(experiment, context)
    source = Source(begin.base, dtype, device, experiment.method.quantization(device.type))
    with context.resident.attached(source, attach) as model:
        yield model, weights
