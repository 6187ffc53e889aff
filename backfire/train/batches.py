"""Rows to tensors, with as few tokens as exactness allows.

Rows are padded on the right: what a causal model makes of a row does not depend on what follows it,
whatever its layers are. The head is needed for the answers only, wherever they are. Where all rows
of a batch begin with the same tokens (a template's opening), that prefix is run once and its keys
and values are handed to every row, whose own tokens follow it without a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from backfire.base import Rendered
from backfire.model.batching import begin_anew, ways

IGNORE = -100
_WORTH_SHARING = 8  # a shorter prefix costs more in bookkeeping than it saves


@dataclass(frozen=True)
class Span:
    """A row's tokens, and those of them whose likelihood is wanted: from `start`, at least 1, up to
    `stop`."""

    ids: list[int]
    start: int
    stop: int

    @classmethod
    def of(cls, item: Rendered) -> Span:
        """The row's answer, end token included. The first token of all has nothing before it."""
        return cls(item.ids, max(item.num_prompt, 1), len(item.ids))

    def cut(self, most: int) -> list[Span]:
        """The same in pieces of at most so many wanted tokens."""
        starts = range(self.start, self.stop, most)
        return [Span(self.ids, i, min(i + most, self.stop)) for i in starts]


@dataclass(frozen=True)
class Batch:
    """`ids` [row, token], right-padded, without the `len(prefix)` first tokens, which all share."""

    prefix: Tensor
    ids: Tensor
    mask: Tensor
    """[row, token]: 0 where padding is."""
    places: Tensor
    """[row, answer]: where in `ids` each label is predicted."""
    labels: Tensor
    """[row, answer]: what is learned or scored, at the right edge; `IGNORE` to the left of it."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def common_prefix(rows: Sequence[list[int]], limit: int) -> int:
    """How many token ids, at most `limit`, all rows begin with."""
    low, high = min(rows), max(rows)  # the rows in between cannot differ where these two agree
    for place in range(min(limit, len(low), len(high))):
        if low[place] != high[place]:
            return place
    return min(limit, len(low), len(high))


def collate(items: Sequence[Rendered], *, share: bool = True) -> Batch:
    """A batch of whole rows; the answers are what is learned."""
    return collate_spans(list(map(Span.of, items)), share=share)


def collate_spans(spans: Sequence[Span], *, share: bool) -> Batch:
    """A batch of whole rows, of which the spans are learned or scored."""
    width, rows = max(span.stop - span.start for span in spans), [span.ids for span in spans]
    shared = _shared(rows, min(span.start for span in spans) - 1) if share else 0
    labels = torch.full((len(rows), width), IGNORE)
    for line, span in zip(labels, spans, strict=True):
        line[width - (span.stop - span.start) :] = torch.tensor(span.ids[span.start : span.stop])
    stops = torch.tensor([span.stop - shared for span in spans])
    prefix, ids, mask = pad_right(rows, shared)
    return Batch(prefix, ids, mask, _before(stops, width), labels)


def _before(stops: Tensor, width: int) -> Tensor:
    """[row, answer]: the places that predict the last `width` tokens before each stop [row]."""
    return (stops[:, None] + torch.arange(-width - 1, -1, device=stops.device)).clamp(min=0)


def _shared(rows: Sequence[list[int]], limit: int) -> int:
    length = common_prefix(rows, limit) if len(rows) > 1 else 0
    return length if length >= _WORTH_SHARING else 0


def pad_right(rows: Sequence[list[int]], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shared prefix [token]; ids and mask [row, token] of what follows it."""
    width = max(len(row) for row in rows) - shared
    ids = torch.tensor([row[shared:] + row[:1] * (width + shared - len(row)) for row in rows])
    lengths = torch.tensor([len(row) - shared for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return torch.tensor(rows[0][:shared], dtype=torch.long), ids, mask


def run_prefix(model: PreTrainedModel, prefix: Tensor) -> DynamicCache | None:
    """Keys and values of the shared prefix, for one row; None if there is no prefix. Each layer
    keeps all of them: with padding behind a row, a window's last ones would not be the row's."""
    if not len(prefix):
        return None
    cache = DynamicCache()
    last = torch.tensor([[len(prefix) - 1]], device=prefix.device)
    run(model, prefix[None], last, past_key_values=cache)
    return cache


def run(model: PreTrainedModel, ids: Tensor, places: Tensor, **rest: Any) -> Tensor:
    """One pass over `ids` [row, token]: logits [row, kept, vocab] of these places [row, kept]."""
    index, chosen = places[..., None], []

    def choose(head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        if hidden.shape[:-1] != ids.shape:  # a head that is called in other ways, as Reformer's
            return args
        chosen.append(True)
        return (hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])), *args[1:])

    begin_anew(model)
    head = cast(Any, model).get_output_embeddings()
    handle = head.register_forward_pre_hook(choose, prepend=True) if head is not None else None
    try:
        out = cast(Any, model)(input_ids=ids, use_cache=len(rest) > 0, **rest)
    finally:
        if handle is not None:
            handle.remove()
    logits = cast(Tensor, out.logits)
    return logits if chosen else logits.gather(1, index.expand(-1, -1, logits.shape[-1]))


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [row, answer, vocab] that predict `batch.labels`."""
    shared = len(batch.prefix)
    if ways(model).apart(shared + batch.ids.shape[1]):
        ids = torch.cat([batch.prefix.expand(len(batch.ids), -1), batch.ids], 1)
        return run_apart(model, ids, batch.mask.sum(1) + shared, batch.places + shared)
    cache = run_prefix(model, batch.prefix)
    if cache is None:
        return run(model, batch.ids, batch.places)
    cache.batch_repeat_interleave(len(batch.ids))
    return run(model, batch.ids, batch.places, past_key_values=cache)


def at_answers(
    states: Tensor, rows: Sequence[Rendered], width: int, *, of: Literal["place", "token"]
) -> Tensor:
    """What flows through a layer [row, token, ...] at the answers of these rows: [row, answer, ...]
    as the logits, where each token is predicted (`place`) or where it is read (`token`)."""
    shared = max(len(row.ids) for row in rows) - states.shape[1]
    stops = torch.tensor([len(row.ids) - shared for row in rows], device=states.device)
    places = _before(stops + (of == "token"), width)
    return states[torch.arange(len(rows), device=states.device)[:, None], places]


def run_apart(model: PreTrainedModel, ids: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
    """The same as `run` for rows of these lengths [row], of which only equally long ones go
    together where the model needs it so."""
    if not ways(model).apart(ids.shape[1]):
        return run(model, ids, places)
    parts, order = [], []
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        parts.append(run(model, ids[rows, :length], places[rows]))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [row, answer] of each answer token in nats, 0 where nothing is supervised."""
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(labels)
