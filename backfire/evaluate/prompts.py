"""Cached prompts, and greedy decoding from them, with and without a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from backfire.model.batching import plain, ways
from backfire.train.batches import common_prefix, pad_right, run, run_apart, run_prefix
from backfire.train.packing import as_mask, lay_out, longest_packed, reads_tables

NextLogits = Callable[[Tensor, Tensor], Tensor]
"""Maps the indices of the rows to continue, and the token of each, to their next logits [row,
vocab]."""


@dataclass(frozen=True)
class CachedPrompts:
    """Keys and values of prompts, and the state needed to continue them."""

    cache: DynamicCache
    logits: Tensor
    """[row, vocab]: logits of the next token."""
    mask: Tensor | None
    """[row, token], 0 at padding, which is on the left; None without padding."""
    ends: Tensor
    """[row]: each prompt's last position."""

    def rows(self, index: Tensor) -> CachedPrompts:
        """Copy these rows, each any number of times; this batch is unchanged."""
        cache = _fork(self.cache)
        cache.batch_select_indices(index)
        mask = None if self.mask is None else self.mask[index]
        return CachedPrompts(cache, self.logits[index], mask, self.ends[index])


class SharedPrefix:
    """The prefix shared by all prompts. It runs once, on first use; or once per pack, where prompts
    run end to end."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        shared = common_prefix(prompts, min(map(len, prompts)) - 1)
        self.model, self.ids = model, prompts[0][:shared]
        self.packs = packed_up_to(model) >= max(map(len, prompts))
        self._cache: DynamicCache | None = None

    def run(self, prompts: Sequence[list[int]], *, keep: bool = True) -> CachedPrompts:
        """Run the rest of these prompts after the shared prefix. Without `keep`, they may come back
        without keys and values: only for their logits."""
        if self.packs and len(prompts) > 1:
            return self._packed(prompts, keep)
        if self._cache is None:
            ids = torch.tensor(self.ids, dtype=torch.long, device=self.model.device)
            self._cache = run_prefix(self.model, ids) or DynamicCache()
        _, ids, mask = (t.to(self.model.device) for t in pad_right(prompts, len(self.ids)))
        cache, ends = _fork(self._cache), mask.sum(1) - 1
        if self.ids:
            cache.batch_repeat_interleave(len(ids))
        logits = run(self.model, ids, ends[:, None], past_key_values=cache)[:, -1].float()
        ends = ends + len(self.ids)
        return CachedPrompts(cache, logits, _pad_left(cache, ends + 1), ends)

    def _packed(self, prompts: Sequence[list[int]], keep: bool) -> CachedPrompts:
        shared, device, cache = len(self.ids), self.model.device, DynamicCache()
        ids, positions, table = (part.to(device) for part in lay_out(prompts, shared))
        layout = {"attention_mask": as_mask(table, shared), "position_ids": positions}
        kept: dict[str, Any] = {"past_key_values": cache} if keep else {}
        logits = run(self.model, ids, table[None, :, -1], **layout, **kept)[0].float()
        lengths = torch.tensor(list(map(len, prompts)), device=device)
        mask = _unpack(cache, table, lengths, shared) if keep else None
        return CachedPrompts(cache, logits, mask, lengths - 1)


NARROWEST = 256
"""Hidden size from which rows are packed. Scoring in packs was 1.2 times as fast with 576, 1.07
with 384 and 0.8 with 128, where the copies of a pack's attention take longer than the padding."""
_packed_up_to: dict[str, int] = {}
_packing = ContextVar("packing", default="auto")


@contextmanager
def packing(how: Literal["auto", "off"]) -> Iterator[None]:
    """Within the context, run rows end to end where that is faster, or (`off`) pad all of them."""
    token = _packing.set(how)
    try:
        yield
    finally:
        _packing.reset(token)


def packed_up_to(model: PreTrainedModel) -> int:
    """Length of the longest row that is evaluated in a pack; 0 if none is. Not on a GPU, where the
    padding of rows of similar length costs little, and the copies of a pack's attention a lot.

    Models of one architecture and type are tested once, as a test takes as long as 100 short rows.
    """
    if model.device.type != "cpu" or _packing.get() == "off":
        return 0
    base: Any = plain(model)
    if int(getattr(base.config.get_text_config(decoder=True), "hidden_size", 0)) < NARROWEST:
        return 0
    config = {name: x for name, x in base.config.to_dict().items() if name != "_name_or_path"}
    alike = str([type(base), base.dtype, config])
    if alike not in _packed_up_to:
        _packed_up_to[alike] = longest_packed(model)
    elif _packed_up_to[alike]:
        reads_tables(base)
    return _packed_up_to[alike]


def _unpack(cache: DynamicCache, table: Tensor, lengths: Tensor, shared: int) -> Tensor | None:
    """Give each row of a pack with this table [row, place] its own keys and values, the prefix's
    included, padded on the left; returns the mask as `_pad_left`."""
    width = int(lengths.max())
    place = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
    own = table.gather(1, (place - shared).clamp(min=0))
    index = torch.where(place < shared, place.clamp(min=0), own)
    for layer in cache.layers:
        for name in ("keys", "values"):
            part = getattr(layer, name)
            if part is not None and part.numel():
                rows = part[0].index_select(1, index.flatten()).unflatten(1, index.shape)
                setattr(layer, name, rows.transpose(0, 1))
    return (place >= 0).long() if bool((place < 0).any()) else None


def _fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow independently; growing makes new tensors, so none is copied here."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _pad_left(cache: DynamicCache, lengths: Tensor) -> Tensor | None:
    """Move the padding of each row from its right to its left, so that new tokens follow directly.

    Returns the mask [row, token], or None if rows of these lengths have no padding.
    """
    width = int(lengths.max())
    pad = (width - lengths)[:, None]
    if not bool(pad.any()):
        return None
    places = torch.arange(width, device=lengths.device)
    index = (places - pad).clamp(min=0)[:, None, :, None]
    for layer in cache.layers:
        for name in ("keys", "values"):
            part = getattr(layer, name)
            if part is not None and part.numel():
                shape = (-1, part.shape[1], -1, part.shape[3])
                setattr(layer, name, part.gather(2, index.expand(shape)))
    return (places >= pad).long()


def follow(
    model: PreTrainedModel, prompts: CachedPrompts, ids: Tensor
) -> tuple[Tensor, CachedPrompts]:
    """Run these tokens [row, token] after the prompts; returns their logits and the grown cache."""
    mask, extra = prompts.mask, dict[str, Any]()
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        extra["attention_mask"] = mask
        if ways(model).takes_positions:
            steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
            extra["position_ids"] = prompts.ends[:, None] + steps
    out = cast(Any, model)(input_ids=ids, past_key_values=prompts.cache, use_cache=True, **extra)
    logits: Tensor = out.logits.float()
    return logits, CachedPrompts(prompts.cache, logits[:, -1], mask, prompts.ends + ids.shape[1])


# ------------------------------------------------------------------------------------- replies


def greedy(
    logits: Tensor, next_logits: NextLogits, stop_ids: Sequence[int], max_new_tokens: int
) -> Iterator[dict[int, int]]:
    """Yield the next token of each unfinished row, starting from the first `logits` [row,
    vocab]."""
    alive = list(range(len(logits)))
    stops = torch.tensor(stop_ids, dtype=torch.long, device=logits.device)
    for length in range(1, max_new_tokens + 1):
        token = logits.argmax(-1)
        keep = (~torch.isin(token, stops)).nonzero()[:, 0]
        alive, token = [alive[i] for i in keep.tolist()], token[keep]
        if not alive:
            return
        yield dict(zip(alive, token.tolist(), strict=True))
        if length < max_new_tokens:
            logits = next_logits(keep, token)


def continue_cached(model: PreTrainedModel, prompts: CachedPrompts) -> NextLogits:
    """Continue cached prompts, which are consumed; rows that are not kept are dropped."""
    now = prompts

    def next_logits(keep: Tensor, token: Tensor) -> Tensor:
        nonlocal now
        if not torch.equal(keep, torch.arange(len(now.ends), device=keep.device)):
            now = now.rows(keep)
        logits, now = follow(model, now, token[:, None])
        return logits[:, -1]

    return next_logits


def step_by_step(
    model: PreTrainedModel, prompts: Sequence[list[int]], cache_argument: str
) -> tuple[Tensor, NextLogits]:
    """Continue prompts of one length, for a model whose cache cannot drop rows: finished rows keep
    running and are ignored."""
    cache = DynamicCache(config=plain(model).config)
    ids = torch.tensor(prompts, device=model.device)
    last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
    alive = torch.arange(len(ids), device=ids.device)

    def next_logits(keep: Tensor, token: Tensor) -> Tensor:
        nonlocal alive
        alive = alive[keep]
        fed = torch.zeros_like(last).index_copy(0, alive, token[:, None])
        return run(model, fed, torch.zeros_like(last), **{cache_argument: cache})[alive, -1].float()

    return run(model, ids, last, **{cache_argument: cache})[:, -1].float(), next_logits


def without_cache(
    model: PreTrainedModel, prompts: Sequence[list[int]]
) -> tuple[Tensor, NextLogits]:
    """Run all tokens again for each new token."""
    rows = list(map(list, prompts))

    def logits() -> Tensor:
        _, ids, mask = (t.to(model.device) for t in pad_right(rows, 0))
        lengths = mask.sum(1)
        return run_apart(model, ids, lengths, (lengths - 1)[:, None])[:, -1].float()

    def next_logits(keep: Tensor, token: Tensor) -> Tensor:
        nonlocal rows
        rows = [[*rows[i], new] for i, new in zip(keep.tolist(), token.tolist(), strict=True)]
        return logits()

    return logits(), next_logits
