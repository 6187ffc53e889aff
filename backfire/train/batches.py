"""Collate rows into tensors with as little computation as exactness allows.

Rows are padded on the right, which cannot change the output of a causal model for the tokens before
the padding. The language-model head runs only on the positions that predict answer tokens. If all
rows of a batch share a prefix (the start of a template), the prefix runs once and every row reuses
its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from backfire.base import Rendered
from backfire.model.batching import reset_state, ways

IGNORE = -100
_WORTH_SHARING = 8  # a shorter prefix costs more in bookkeeping than it saves


@dataclass(frozen=True)
class Span:
    """A row's token ids and the range to score, `start` (at least 1) to `stop` (exclusive)."""

    ids: list[int]
    start: int
    stop: int

    @classmethod
    def of(cls, item: Rendered) -> Span:
        """The row's answer with its end token, except a token at position 0 (nothing predicts
        it)."""
        return cls(item.ids, max(item.num_prompt, 1), len(item.ids))

    def cut(self, limit: int) -> list[Span]:
        """Split into spans of at most `limit` scored tokens each."""
        starts = range(self.start, self.stop, limit)
        return [Span(self.ids, i, min(i + limit, self.stop)) for i in starts]


@dataclass(frozen=True)
class Batch:
    """`ids` [row, token], right-padded, without the shared prefix."""

    prefix: Tensor
    ids: Tensor
    mask: Tensor
    """[row, token]: 0 at padding."""
    places: Tensor
    """[row, answer]: the position in `ids` that predicts each label."""
    labels: Tensor
    """[row, answer]: the tokens to learn or score, right-aligned; `IGNORE` to their left."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def common_prefix(rows: Sequence[list[int]], limit: int) -> int:
    """Length of the longest common prefix of all rows, at most `limit`."""
    low, high = min(rows), max(rows)  # the rows in between cannot differ where these two agree
    for place in range(min(limit, len(low), len(high))):
        if low[place] != high[place]:
            return place
    return min(limit, len(low), len(high))


def collate(items: Sequence[Rendered], *, share: bool = True) -> Batch:
    """Collate whole rows; the labels are their answers."""
    return collate_spans(list(map(Span.of, items)), share=share)


def collate_spans(spans: Sequence[Span], *, share: bool) -> Batch:
    """Collate whole rows; the labels are the tokens of the spans."""
    width, rows = max(span.stop - span.start for span in spans), [span.ids for span in spans]
    shared = _shared(rows, min(span.start for span in spans) - 1) if share else 0
    labels = torch.full((len(rows), width), IGNORE)
    for line, span in zip(labels, spans, strict=True):
        line[width - (span.stop - span.start) :] = torch.tensor(span.ids[span.start : span.stop])
    stops = torch.tensor([span.stop - shared for span in spans])
    prefix, ids, mask = pad_right(rows, shared)
    return Batch(prefix, ids, mask, _before(stops, width), labels)


def _before(stops: Tensor, width: int) -> Tensor:
    """[row, answer]: the positions that predict the `width` tokens before each stop [row]."""
    return (stops[:, None] + torch.arange(-width - 1, -1, device=stops.device)).clamp(min=0)


def _shared(rows: Sequence[list[int]], limit: int) -> int:
    length = common_prefix(rows, limit) if len(rows) > 1 else 0
    return length if length >= _WORTH_SHARING else 0


def pad_right(rows: Sequence[list[int]], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """The shared prefix [token], then ids and mask [row, token] of the tokens after it."""
    width = max(len(row) for row in rows) - shared
    ids = torch.tensor([row[shared:] + row[:1] * (width + shared - len(row)) for row in rows])
    lengths = torch.tensor([len(row) - shared for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return torch.tensor(rows[0][:shared], dtype=torch.long), ids, mask


def run_prefix(model: PreTrainedModel, prefix: Tensor) -> DynamicCache | None:
    """Keys and values of the shared prefix, for one row; None without a prefix.

    Every layer keeps all of them: a sliding window over a padded row would drop the row's own.
    """
    if not len(prefix):
        return None
    cache = DynamicCache()
    last = torch.tensor([[len(prefix) - 1]], device=prefix.device)
    run(model, prefix[None], last, past_key_values=cache)
    return cache


def run(model: PreTrainedModel, ids: Tensor, places: Tensor, **rest: Any) -> Tensor:
    """Run `ids` [row, token]; returns the logits [row, kept, vocab] at these places [row, kept]."""
    index, chosen = places[..., None], []

    def choose(head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        if hidden.shape[:-1] != ids.shape:  # a head with another input shape, as in Reformer
            return args
        chosen.append(True)
        return (hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])), *args[1:])

    reset_state(model)
    head = cast(Any, model).get_output_embeddings()
    hook = head.register_forward_pre_hook(choose, prepend=True) if head is not None else None
    with hook or nullcontext():
        out = cast(Any, model)(input_ids=ids, use_cache=len(rest) > 0, **rest)
    logits = cast(Tensor, out.logits)
    return logits if chosen else logits.gather(1, index.expand(-1, -1, logits.shape[-1]))


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [row, answer, vocab] that predict `batch.labels`."""
    shared = len(batch.prefix)
    if ways(model).depends_on_length(shared + batch.ids.shape[1]):
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
    """Select hidden states [row, token, ...] at the answers of these rows: [row, answer, ...].

    They align with the logits, at the position that predicts each token (`place`) or at the token.
    """
    shared = max(len(row.ids) for row in rows) - states.shape[1]
    stops = torch.tensor([len(row.ids) - shared for row in rows], device=states.device)
    places = _before(stops + (of == "token"), width)
    return states[torch.arange(len(rows), device=states.device)[:, None], places]


def run_apart(model: PreTrainedModel, ids: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
    """`run` for rows of these lengths [row]; a model that cannot handle padding gets one batch per
    length."""
    if not ways(model).depends_on_length(ids.shape[1]):
        return run(model, ids, places)
    parts, order = [], []
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        parts.append(run(model, ids[rows, :length], places[rows]))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [..., vocab] in at least float32."""
    return wide(logits).log_softmax(-1)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [row, answer] of each answer token in nats, 0 where the label is `IGNORE`."""
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(labels)
