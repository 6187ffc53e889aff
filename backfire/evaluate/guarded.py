"""Greedy replies under a guard, which sees each token before it is written.

Rows that a guard leaves alone get the same reply as without it. As in `inference.read`, the next
prompt takes the place of a finished row where the models support it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backfire.base import Guard, ReplyDefense
from backfire.evaluate.budget import Budget
from backfire.evaluate.inference import Tick, _no_tick, begin_replies
from backfire.evaluate.prompts import CachedPrompts, SharedPrefix
from backfire.evaluate.slots import Choose, Start, Task, write
from backfire.model.batching import ways
from backfire.model.head import for_evaluation
from backfire.rng import derive


@dataclass(frozen=True)
class Guarding:
    """A defense that guards replies, and what it needs at run time."""

    defense: ReplyDefense
    seed: int
    reference: PreTrainedModel | None = None
    """The model that the defense compares with, if it does."""
    opening: Sequence[int] = ()
    """The tokens that the template writes before every answer; a guard does not see them."""

    def guard(self, ids: Sequence[str]) -> Guard:
        """A guard of the replies to the rows with these ids."""
        guard = self.defense.guard([derive(self.seed, self.defense.name, row) for row in ids])
        return _BehindOpening(guard, self.opening) if self.opening else guard


class _BehindOpening(Guard):
    """A guard that sees the tokens of a reply from behind the template's opening of it."""

    def __init__(self, guard: Guard, opening: Sequence[int]) -> None:
        self.inner, self.opening = guard, opening
        self.begun = Counter[int]()

    def tokens(
        self, rows: Sequence[int], own: Sequence[int], logits: Tensor, reference: Tensor | None
    ) -> list[int | None]:
        chosen: list[int | None] = list(own)
        seen = [place for place, row in enumerate(rows) if not self._opens(row, own[place])]
        if len(seen) == len(rows):
            return self.inner.tokens(rows, own, logits, reference)
        if seen:
            theirs = None if reference is None else reference[seen]
            shown = [rows[place] for place in seen], [own[place] for place in seen]
            for place, token in zip(
                seen, self.inner.tokens(*shown, logits[seen], theirs), strict=True
            ):
                chosen[place] = token
        return chosen

    def _opens(self, row: int, token: int) -> bool:
        """Whether a reply still follows the opening with this token."""
        place, size = self.begun[row], len(self.opening)
        follows = place < size and token == self.opening[place]
        self.begun[row] = place + 1 if follows else size
        return follows

    def replaced(self, row: int) -> float:
        return self.inner.replaced(row)

    def text(self, row: int) -> str | None:
        return self.inner.text(row)


@dataclass(frozen=True)
class Reply:
    """A guarded reply."""

    ids: list[int]
    """Its tokens, without the end token; those before the stop, if it was stopped."""
    replaced: float
    text: str | None
    """What is said instead; None if the reply stays."""


@torch.inference_mode()
def replies(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    guarding: Guarding,
    ids: Sequence[str],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    batch_size: int | None = None,
    tick: Tick = _no_tick,
) -> list[Reply]:
    """The guarded replies to these prompts of the rows with these ids.

    Raises:
        CellError: memory runs out at one row (`oom`).
    """
    out: list[Reply] = [Reply([], 0.0, None)] * len(prompts)
    models = _models(model, guarding)
    call = _Call(models, prompts, guarding, ids, max_new_tokens, frozenset(stop_ids))
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    whole = [row for row in order if not call.extends(row)]
    with _evaluating(models):
        budget = Budget(model, batch_size, models=len(models))
        refilled = call.refilled(order[len(whole) :], budget)
        for part in chain(refilled, call.batches(whole, budget)):
            for row, reply in part.items():
                out[row] = reply
            tick(len(part))
    return out


@dataclass(frozen=True)
class _Call:
    """What `replies` is asked for. Its methods yield replies by the numbers of their prompts."""

    models: Sequence[PreTrainedModel]
    prompts: Sequence[list[int]]
    guarding: Guarding
    ids: Sequence[str]
    most: int
    """Most tokens of a reply."""
    stop_ids: Collection[int]

    @property
    def level(self) -> bool:
        """Whether only prompts of one length may run together."""
        return not all(ways(model).pads_left for model in self.models)

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    def extends(self, row: int) -> bool:
        """Whether this prompt can join a batch of others."""
        found, longest = map(ways, self.models), len(self.prompts[row]) + self.most
        return all(can.extends_cache and not can.depends_on_length(longest) for can in found)

    def refilled(self, order: Sequence[int], budget: Budget) -> Iterator[dict[int, Reply]]:
        """From a batch that stays full."""
        if not order or not self.most:
            return
        chosen, guards = [self.prompts[row] for row in order], list[Guard]()
        prefixes = [SharedPrefix(model, chosen) for model in self.models]

        def begin(prefix: SharedPrefix, part: list[int]) -> CachedPrompts:
            return prefix.run([self.prompts[row] for row in part])

        def choose() -> Choose:
            guards.append(self.guarding.guard(self.ids))
            return partial(_chosen, guards[-1], self.stop_ids)

        starts: list[Start] = [partial(begin, prefix) for prefix in prefixes]
        packed = len(prefixes[0].ids) if all(prefix.packs for prefix in prefixes) else None
        limits = (self.lengths, self.most, self.stop_ids, self.most, self.level, packed)
        for ended in write(self.models, Task(starts, *limits, choose), order, budget):
            yield {row: _reply(reply, guards[-1], row) for row, reply in ended}

    def batches(self, order: Sequence[int], budget: Budget) -> Iterator[dict[int, Reply]]:
        """From batches whose finished rows leave."""

        def work(part: list[int]) -> dict[int, Reply]:
            guard = self.guarding.guard([self.ids[row] for row in part])
            written: list[list[int]] = [[] for _ in part]
            chosen = [self.prompts[row] for row in part]
            for step in _tokens(self.models, chosen, guard, self.stop_ids, self.most):
                for place, token in step.items():
                    written[place].append(token)
            return {row: _reply(written[n], guard, n) for n, row in enumerate(part)}

        lengths, level = self.lengths, self.level
        for _, part in budget.batches(order, work, lengths=lengths, extra=self.most, level=level):
            yield part


def _reply(ids: list[int], guard: Guard, number: int) -> Reply:
    return Reply(ids, guard.replaced(number), guard.text(number))


@torch.inference_mode()
def stream(
    model: PreTrainedModel,
    prompt: list[int],
    guarding: Guarding,
    guard: Guard,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> Iterator[int]:
    """Yield one prompt's guarded reply token by token. `guard` then knows whether it stays."""
    models = _models(model, guarding)
    with _evaluating(models):
        for step in _tokens(models, [prompt], guard, stop_ids, max_new_tokens):
            yield step[0]


def _tokens(
    models: Sequence[PreTrainedModel],
    prompts: list[list[int]],
    guard: Guard,
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> Iterator[dict[int, int]]:
    """Yield the next token of each reply that is not complete, by its number."""
    begun = [begin_replies(one, prompts, max_new_tokens) for one in models]
    logits, rows = [first for first, _ in begun], list(range(len(prompts)))
    for length in range(1, max_new_tokens + 1):
        kept = [
            (place, token)
            for place, token in enumerate(_chosen(guard, stop_ids, rows, logits))
            if token is not None and token not in stop_ids
        ]
        if not kept:
            return
        rows = [rows[place] for place, _ in kept]
        yield dict(zip(rows, (token for _, token in kept), strict=True))
        if length < max_new_tokens:
            index = torch.tensor([place for place, _ in kept], device=models[0].device)
            new = torch.tensor([token for _, token in kept], device=models[0].device)
            logits = [follow(index, new) for _, follow in begun]


def _chosen(
    guard: Guard, stop_ids: Collection[int], rows: list[int], logits: list[Tensor]
) -> list[int | None]:
    """The next token of each of these replies; a guard does not see one that ends its reply."""
    own = logits[0].argmax(-1).tolist()
    chosen: list[int | None] = list(own)
    if going := [place for place, token in enumerate(own) if token not in stop_ids]:
        seen = [part[going] for part in logits] if len(going) < len(rows) else logits
        reference = seen[1] if len(seen) > 1 else None
        tokens = guard.tokens([rows[n] for n in going], [own[n] for n in going], seen[0], reference)
        for place, token in zip(going, tokens, strict=True):
            chosen[place] = token
    return chosen


def _models(model: PreTrainedModel, guarding: Guarding) -> list[PreTrainedModel]:
    return [model] if guarding.reference is None else [model, guarding.reference]


def _evaluating(models: Sequence[PreTrainedModel]) -> ExitStack:
    stack = ExitStack()
    for one in models:
        stack.enter_context(for_evaluation(one))
    return stack
