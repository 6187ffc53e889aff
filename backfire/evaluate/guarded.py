"""Greedy replies under a guard, which sees each token before it is written.

Rows that a guard leaves alone get the same reply as without it. Prompts run in batches of similar
length, whose finished rows leave; unlike in `inference.read`, no new prompt takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from backfire.base import Guard, ReplyDefense
from backfire.evaluate.budget import Budget
from backfire.evaluate.inference import Tick, _no_tick, begin_replies
from backfire.model.batching import ways
from backfire.model.head import for_evaluation
from backfire.rng import derive


@dataclass(frozen=True)
class Guarding:
    """A defense that guards replies, and what it needs at run time."""

    defense: ReplyDefense
    seed: int
    reference: PreTrainedModel | None = None
    """The model before fine-tuning, if the defense compares with it."""

    def guard(self, ids: Sequence[str]) -> Guard:
        """A guard of the replies to the rows with these ids."""
        return self.defense.guard([derive(self.seed, self.defense.name, row) for row in ids])


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
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: -lengths[row])
    level = not all(ways(one).pads_left for one in _models(model, guarding))

    def work(part: list[int]) -> list[Reply]:
        guard = guarding.guard([ids[row] for row in part])
        written: list[list[int]] = [[] for _ in part]
        chosen = [prompts[row] for row in part]
        for step in tokens(model, chosen, guard, guarding.reference, stop_ids, max_new_tokens):
            for row, token in step.items():
                written[row].append(token)
        return [Reply(line, guard.replaced(n), guard.text(n)) for n, line in enumerate(written)]

    with _evaluating(model, guarding):
        budget = Budget(model, batch_size)
        limits = {"lengths": lengths, "extra": max_new_tokens, "level": level}
        for part, found in budget.batches(order, work, **limits):  # type: ignore[arg-type]
            for row, reply in zip(part, found, strict=True):
                out[row] = reply
            tick(len(part))
    return out


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
    with _evaluating(model, guarding):
        steps = tokens(model, [prompt], guard, guarding.reference, stop_ids, max_new_tokens)
        for step in steps:
            yield step[0]


def tokens(
    model: PreTrainedModel,
    prompts: list[list[int]],
    guard: Guard,
    reference: PreTrainedModel | None,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> Iterator[dict[int, int]]:
    """Yield the next token of each reply that is not complete, by its number."""
    models = [model, reference] if reference is not None else [model]
    begun = [begin_replies(one, prompts, max_new_tokens) for one in models]
    logits, rows = [first for first, _ in begun], list(range(len(prompts)))
    for length in range(1, max_new_tokens + 1):
        own = logits[0].argmax(-1).tolist()
        going = [place for place, token in enumerate(own) if token not in stop_ids]
        if not going:
            return
        seen = [part[going] for part in logits] if len(going) < len(rows) else logits
        other = seen[1] if len(seen) > 1 else None
        chosen = guard.tokens([rows[n] for n in going], [own[n] for n in going], seen[0], other)
        kept = [
            (place, token)
            for place, token in zip(going, chosen, strict=True)
            if token is not None and token not in stop_ids
        ]
        if not kept:
            return
        rows = [rows[place] for place, _ in kept]
        yield dict(zip(rows, (token for _, token in kept), strict=True))
        if length < max_new_tokens:
            index = torch.tensor([place for place, _ in kept], device=model.device)
            new = torch.tensor([token for _, token in kept], device=model.device)
            logits = [follow(index, new) for _, follow in begun]


def _models(model: PreTrainedModel, guarding: Guarding) -> list[PreTrainedModel]:
    return [model] if guarding.reference is None else [model, guarding.reference]


def _evaluating(model: PreTrainedModel, guarding: Guarding) -> ExitStack:
    stack = ExitStack()
    for one in _models(model, guarding):
        stack.enter_context(for_evaluation(one))
    return stack
