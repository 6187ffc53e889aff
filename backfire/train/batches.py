"""Collate rows into tensors with as little computation as exactness allows.

Rows are padded on the right, which cannot change the output of a causal model for the tokens before
the padding; or they are packed end to end (see `train.packing`). The language-model head runs only
on the positions that predict answer tokens. If all rows of a batch share a prefix (the start of a
template), the prefix runs once and every row reuses its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from backfire.base import Rendered, TrainHook
from backfire.model.batching import drops, plain, reset_state, ways
from backfire.train.packing import as_mask, lay_out, longest_packed

IGNORE = -100
_MOST_LOGITS = 2**23  # whose probabilities are held at once (32 MiB)
_WORTH_PACKING = 0.97  # of the padded tokens: a pack of more is slower (see docs/decisions)
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
    """Rows without the shared prefix, right-padded; or, if there is a `table`, the prefix and the
    rows packed in one line."""

    prefix: Tensor
    ids: Tensor
    """[row, token], or [1, token] of a pack."""
    mask: Tensor
    """[row, token]: 0 at padding; in a pack the position of each token in its row."""
    places: Tensor
    """[row, answer]: the position in the row's line of `ids` that predicts each label."""
    labels: Tensor
    """[row, answer]: the tokens to learn or score, right-aligned; `IGNORE` to their left."""
    table: Tensor | None = None
    """[row, place]: the position in a pack of each row's tokens."""
    groups: int = 1
    """Number of parts of a pack, each of which has the prefix before its rows."""

    def to(self, device: torch.device) -> Batch:
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        tensors = {name: x for name, x in parts.items() if isinstance(x, Tensor)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in tensors.items()}
        return replace(self, **moved)


@dataclass
class Layout:
    """How a training run collates its rows."""

    share: bool
    """Whether rows share the computation of a common prefix."""
    longest_packed: int
    """Rows up to this length may be packed; 0: none."""
    answer_size: float = 0.0
    """Memory of an answer token's logits, in tokens that run through the layers."""
    once: bool = False
    """Whether padded rows share no prefix, so that a pass runs the model once: a recomputed layer
    would lack the prefix's keys and values, and with sharded weights the passes of all ranks must
    be alike whatever their rows."""
    padded_by: str = ""
    """What makes the run pad all rows; empty if they may be packed."""
    limit: int | None = None
    """A row longer than this shares a pass only with rows of its length (see `Ways.limit`)."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        hooks: Sequence[TrainHook],
        *,
        once: bool = False,
        packing: str = "auto",
    ) -> Layout:
        """The fastest layout that the model and these hooks allow; `packing` as in `Machine`."""
        # Rows that share a prefix would also share its dropout; packed ones draw another.
        same, opposed = not drops(model), next((hook for hook in hooks if not hook.packs), None)
        longest, why = 0, ""
        if packing == "off":
            why = "the option --packing off"
        elif not same:
            why = "dropout, which would be drawn in another order"
        elif opposed:
            why = f"defense '{type(opposed).__module__.rpartition('.')[2]}'"
        elif not (longest := longest_packed(model)):
            why = f"the attention of '{plain(model).config.model_type}'"
        shares = same and all(hook.shares_prefix for hook in hooks) and ways(model).extends_cache
        return cls(shares, longest, once=once, padded_by=why, limit=ways(model).limit)

    def collate(self, rows: Sequence[Rendered], *, flat: bool = False) -> Batch:
        pack, share, _ = self._choose(rows)
        return collate(rows, share=share, pack=pack, flat=flat)

    def size(self, rows: Sequence[Rendered]) -> float:
        """Number of tokens that run through the layers for these rows, with their logits; infinite
        if they cannot share a pass."""
        lengths = {len(row.ids) for row in rows}
        if self.limit is not None and len(lengths) > 1 and max(lengths) > self.limit:
            return math.inf
        answers = len(rows) * max(row.num_supervised for row in rows)  # for hooks that read them
        return self._choose(rows)[2] + self.answer_size * answers

    def _choose(self, rows: Sequence[Rendered]) -> tuple[bool, bool, int]:
        """Whether to pack these rows, whether they share their prefix, and how many tokens run."""
        lengths, again = [len(row.ids) for row in rows], len(rows) - 1
        limit = min(max(row.num_prompt, 1) for row in rows) - 1
        saved = again * _shared([row.ids for row in rows], limit) if self.share else 0
        packed, shares = sum(lengths) - saved, not self.once
        padded = len(rows) * max(lengths) - (saved if shares else 0)
        if again and max(lengths) <= self.longest_packed and packed <= _WORTH_PACKING * padded:
            return True, self.share, packed
        return False, self.share and shares, padded


def common_prefix(rows: Sequence[list[int]], limit: int) -> int:
    """Length of the longest common prefix of all rows, at most `limit`."""
    low, high = min(rows), max(rows)  # the rows in between cannot differ where these two agree
    for place in range(min(limit, len(low), len(high))):
        if low[place] != high[place]:
            return place
    return min(limit, len(low), len(high))


def collate(
    items: Sequence[Rendered], *, share: bool = True, pack: bool = False, flat: bool = False
) -> Batch:
    """Collate whole rows; the labels are their answers."""
    return collate_spans(list(map(Span.of, items)), share=share, pack=pack, flat=flat)


def collate_spans(
    spans: Sequence[Span], *, share: bool, pack: bool = False, flat: bool = False
) -> Batch:
    """Collate whole rows; the labels are the tokens of the spans, in a `flat` pack [1, answer] of
    all rows."""
    shared = shared_prefix(spans) if share else 0
    if pack:
        return packed(spans, shared, flat=flat)
    labels, places = _answers(spans, shared)
    return Batch(*pad_right([span.ids for span in spans], shared), places, labels)


def packed(spans: Sequence[Span], shared: int, *, flat: bool) -> Batch:
    """Rows packed in one line behind the prefix of `shared` tokens; see `collate_spans`."""
    rows = [span.ids for span in spans]
    labels, places = _answers(spans, shared)
    ids, positions, table = lay_out(rows, shared)
    places = places + table[:, :1]
    if flat:
        places, labels = (x[labels != IGNORE][None] for x in (places, labels))
    prefix = torch.tensor(rows[0][:shared], dtype=torch.long)
    return Batch(prefix, ids, positions, places, labels, table)


def in_one_line(packs: Sequence[Batch]) -> Batch:
    """Packs with prefixes of equal length, one after another; places and labels become flat."""
    tables = [cast(Tensor, pack.table) for pack in packs]
    width, places, start = max(table.shape[1] for table in tables), [], 0
    for number, pack in enumerate(packs):
        last = tables[number][:, -1:].expand(-1, width - tables[number].shape[1])
        tables[number] = torch.cat([tables[number], last], 1) + start
        places.append(pack.places.flatten() + start)
        start += pack.ids.shape[1]
    return Batch(
        packs[0].prefix,
        torch.cat([pack.ids for pack in packs], 1),
        torch.cat([pack.mask for pack in packs], 1),
        torch.cat(places)[None],
        torch.cat([pack.labels.flatten() for pack in packs])[None],
        torch.cat(tables),
        len(packs),
    )


def _answers(spans: Sequence[Span], shared: int) -> tuple[Tensor, Tensor]:
    """Labels [row, answer] of the spans, and the position that predicts each, counted from the end
    of the shared prefix."""
    width = max(span.stop - span.start for span in spans)
    labels = torch.full((len(spans), width), IGNORE)
    for line, span in zip(labels, spans, strict=True):
        line[width - (span.stop - span.start) :] = torch.tensor(span.ids[span.start : span.stop])
    return labels, _before(torch.tensor([span.stop - shared for span in spans]), width)


def _before(stops: Tensor, width: int) -> Tensor:
    """[row, answer]: the positions that predict the `width` tokens before each stop [row]."""
    return (stops[:, None] + torch.arange(-width - 1, -1, device=stops.device)).clamp(min=0)


def shared_prefix(spans: Sequence[Span]) -> int:
    """Length of the prefix that these rows share before any span; 0 if it is too short."""
    return _shared([span.ids for span in spans], min(span.start for span in spans) - 1)


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
    """Run `ids` [line, token]; returns the logits [row, kept, vocab] at these places [row, kept],
    of each row's line or of the only one."""
    lines = torch.arange(len(places), device=ids.device) % len(ids)
    index, chosen = (lines[:, None] * ids.shape[1] + places).flatten(), []

    def pick(states: Tensor) -> Tensor:
        picked = states.flatten(0, 1).index_select(0, index.to(states.device))
        return picked.view(*places.shape, states.shape[-1])  # there may be no place at all

    def choose(head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        if hidden.shape[:-1] != ids.shape:  # a head with another input shape, as in Reformer
            return args
        chosen.append(True)
        return (pick(hidden), *args[1:])

    reset_state(model)
    head = cast(Any, model).get_output_embeddings()
    hook = head.register_forward_pre_hook(choose, prepend=True) if head is not None else None
    with hook or nullcontext():
        out = cast(Any, model)(input_ids=ids, use_cache="past_key_values" in rest, **rest)
    logits = cast(Tensor, out.logits)
    return logits if chosen else pick(logits)


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [row, answer, vocab] that predict `batch.labels`."""
    shared = len(batch.prefix)
    if batch.table is not None:
        mask = as_mask(batch.table, shared, batch.groups)
        return run(model, batch.ids, batch.places, attention_mask=mask, position_ids=batch.mask)
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
    """Select hidden states [row, token, ...], or [1, token, ...] of a pack, at the answers of these
    rows: [row, answer, ...].

    They align with the logits, at the position that predicts each token (`place`) or at the token.
    """
    lengths = torch.tensor([len(row.ids) for row in rows])
    if len(states) < len(rows):
        shared = (int(lengths.sum()) - states.shape[1]) // (len(rows) - 1)
        lengths -= shared
        starts = shared + lengths.cumsum(0) - lengths
    else:
        lengths -= int(lengths.max()) - states.shape[1]  # without the shared prefix
        starts = torch.arange(len(rows)) * states.shape[1]
    places = starts[:, None] + _before(lengths + (of == "token"), width)
    return states.flatten(0, 1)[places.to(states.device)]


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


def one_run_each(model: PreTrainedModel, rows: Sequence[Rendered]) -> list[list[Rendered]]:
    """Parts of these rows for each of which `answer_logits` runs the model once, if they share no
    prefix: see `run_apart`."""
    if not ways(model).depends_on_length(max(len(row.ids) for row in rows)):
        return [list(rows)]
    by_length: dict[int, list[Rendered]] = {}
    for row in rows:
        by_length.setdefault(len(row.ids), []).append(row)
    return [by_length[length] for length in sorted(by_length, reverse=True)]


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [..., vocab] in at least float32."""
    return wide(logits).log_softmax(-1)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [row, answer] of each answer token in nats, 0 where the label is `IGNORE`.

    The probabilities of many tokens are not kept for the backward pass but computed again.
    """
    every, wanted = logits.flatten(0, 1), labels.flatten()
    if every.numel() <= _MOST_LOGITS or not logits.requires_grad:
        return _cross_entropy(every, wanted).view_as(labels)
    count = max(1, _MOST_LOGITS // every.shape[1])
    parts = [
        checkpoint(_cross_entropy, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(every, count), torch.split(wanted, count), strict=True)
    ]
    return torch.cat(parts).view_as(labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        wide(logits), labels, ignore_index=IGNORE, reduction="none"
    )
