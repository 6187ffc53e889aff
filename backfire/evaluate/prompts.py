"""Prompts that were run once, and how a model goes on from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from backfire.model.batching import plain, ways
from backfire.train.batches import common_prefix, pad_right, run, run_apart, run_prefix

Next = Callable[[Tensor, Tensor], Tensor]
"""From which rows go on and the token of each to the logits [row, vocab] of what comes then."""


@dataclass(frozen=True)
class Prompts:
    """Keys and values of prompts, and where to go on."""

    cache: DynamicCache
    logits: Tensor
    """[row, vocab] of the token that comes next."""
    mask: Tensor | None
    """[row, token], 0 where padding is, which is on the left; None if there is none."""
    ends: Tensor
    """[row]: each prompt's last position."""

    def rows(self, index: Tensor) -> Prompts:
        """These rows, any number of times each; this batch stays as it is."""
        cache = _fork(self.cache)
        cache.batch_select_indices(index)
        mask = None if self.mask is None else self.mask[index]
        return Prompts(cache, self.logits[index], mask, self.ends[index])


class Opening:
    """The tokens that all prompts begin with, which are run once, when they are first needed."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        shared = common_prefix(prompts, min(map(len, prompts)) - 1)
        self.model, self.ids = model, prompts[0][:shared]
        self._cache: DynamicCache | None = None

    def run(self, prompts: Sequence[list[int]]) -> Prompts:
        """What follows the opening in these prompts, run on from it."""
        if self._cache is None:
            ids = torch.tensor(self.ids, dtype=torch.long, device=self.model.device)
            self._cache = run_prefix(self.model, ids) or DynamicCache()
        _, ids, mask = (t.to(self.model.device) for t in pad_right(prompts, len(self.ids)))
        cache, ends = _fork(self._cache), mask.sum(1) - 1
        if self.ids:
            cache.batch_repeat_interleave(len(ids))
        logits = run(self.model, ids, ends[:, None], past_key_values=cache)[:, -1].float()
        ends = ends + len(self.ids)
        return Prompts(cache, logits, _to_the_left(cache, ends + 1), ends)


def _fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow on its own; growing makes new tensors, so none is copied."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _to_the_left(cache: DynamicCache, lengths: Tensor) -> Tensor | None:
    """Move the padding behind each row before it, so that what comes next follows the row without
    a gap; the mask [row, token] that says where it is, or None if rows of these lengths have none.
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


def follow(model: PreTrainedModel, prompts: Prompts, ids: Tensor) -> tuple[Tensor, Prompts]:
    """Run these tokens [row, token] after the prompts: their logits, and what then is in memory."""
    mask, told = prompts.mask, dict[str, Any]()
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        told["attention_mask"] = mask
        if ways(model).told_places:
            steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)
            told["position_ids"] = prompts.ends[:, None] + steps
    out = cast(Any, model)(input_ids=ids, past_key_values=prompts.cache, use_cache=True, **told)
    logits: Tensor = out.logits.float()
    return logits, Prompts(prompts.cache, logits[:, -1], mask, prompts.ends + ids.shape[1])


# ------------------------------------------------------------------------------------- replies


def greedy(
    logits: Tensor, next_logits: Next, stop_ids: Sequence[int], max_new_tokens: int
) -> Iterator[dict[int, int]]:
    """The next token of each row that goes on, from the `logits` [row, vocab] of the first."""
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


def from_memory(model: PreTrainedModel, prompts: Prompts) -> Next:
    """Go on from prompts, which are used up; rows that are not kept are let go."""
    now = prompts

    def go_on(keep: Tensor, token: Tensor) -> Tensor:
        nonlocal now
        if not torch.equal(keep, torch.arange(len(now.ends), device=keep.device)):
            now = now.rows(keep)
        logits, now = follow(model, now, token[:, None])
        return logits[:, -1]

    return go_on


def step_by_step(
    model: PreTrainedModel, prompts: Sequence[list[int]], memory: str
) -> tuple[Tensor, Next]:
    """Prompts of one length, of a model that takes one more token at a time and cannot let go of
    rows: those that have ended are run on unread."""
    cache = DynamicCache(config=plain(model).config)
    ids = torch.tensor(prompts, device=model.device)
    last = torch.full_like(ids[:, :1], ids.shape[1] - 1)
    alive = torch.arange(len(ids), device=ids.device)

    def go_on(keep: Tensor, token: Tensor) -> Tensor:
        nonlocal alive
        alive = alive[keep]
        fed = torch.zeros_like(last).index_copy(0, alive, token[:, None])
        return run(model, fed, torch.zeros_like(last), **{memory: cache})[alive, -1].float()

    return run(model, ids, last, **{memory: cache})[:, -1].float(), go_on


def anew(model: PreTrainedModel, prompts: Sequence[list[int]]) -> tuple[Tensor, Next]:
    """All tokens are run again for each new one."""
    rows = list(map(list, prompts))

    def logits() -> Tensor:
        _, ids, mask = (t.to(model.device) for t in pad_right(rows, 0))
        lengths = mask.sum(1)
        return run_apart(model, ids, lengths, (lengths - 1)[:, None])[:, -1].float()

    def go_on(keep: Tensor, token: Tensor) -> Tensor:
        nonlocal rows
        rows = [[*rows[i], new] for i, new in zip(keep.tolist(), token.tolist(), strict=True)]
        return logits()

    return logits(), go_on
