"""Likelihoods and replies for many prompts at once, equal to those of each prompt alone.

Prompts are sorted by length, and run end to end on a CPU; a prefix that all share (the start of a
template) runs once, and each prompt once for both its candidates and its reply; the head runs only
where a logit is read; the next prompt takes the place of a finished row. Models that do not support
this get whole rows, or rows of one length (see `backfire.model.batching`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backfire.base import Rendered
from backfire.evaluate.budget import Budget
from backfire.evaluate.prompts import (
    CachedPrompts,
    NextLogits,
    SharedPrefix,
    continue_cached,
    follow,
    greedy,
    packed_up_to,
    step_by_step,
    without_cache,
)
from backfire.evaluate.slots import Task, write
from backfire.model.batching import ways
from backfire.model.head import for_evaluation
from backfire.train.batches import (
    IGNORE,
    Span,
    answer_logits,
    collate_spans,
    common_prefix,
    token_losses,
)
from backfire.train.microbatch import unless_out_of_memory

Tick = Callable[[int], None]
Scores = tuple[float, ...]


def _no_tick(count: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Reading:
    """A model's scores and reply for one prompt."""

    scores: Scores
    """Log-likelihood in nats of each candidate after the prompt."""
    reply: list[int]
    """Greedy continuation as token ids, without the end token."""


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    candidates: Sequence[Sequence[list[int]]] | None = None,
    max_new_tokens: int = 0,
    stop_ids: Sequence[int] = (),
    batch_size: int | None = None,
    tick: Tick = _no_tick,
) -> list[Reading]:
    """Score `candidates` (token ids, any number per prompt) and generate up to `max_new_tokens`.

    Where the model supports it, each prompt runs once for all of this. `batch_size` limits the rows
    of a batch.

    Raises:
        CellError: memory runs out at one row (`oom`), or the model is not causal (`bad-data`).
    """
    out: list[Reading] = [Reading((), [])] * len(prompts)
    if not prompts:
        return out
    options = candidates or [[]] * len(prompts)
    longest = max((len(ids) for row in options for ids in row), default=0)
    can, budget = ways(model), Budget(model, batch_size)
    lengths, extra = [len(prompt) for prompt in prompts], max(max_new_tokens, longest)
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    # A candidate with too many logits for one pass is scored in pieces, as whole rows are.
    piecemeal = not can.extends_cache or longest > budget.logits
    whole = [i for i in order if piecemeal or can.depends_on_length(lengths[i] + extra)]
    batches: Iterator[tuple[list[int], list[Reading]]] = iter(())
    with for_evaluation(model):
        if at_once := [] if piecemeal else order[len(whole) :]:
            batches = _read_cached(
                model, prompts, at_once, options, budget, stop_ids, max_new_tokens
            )
        rest = _read_whole(model, prompts, whole, options, budget, stop_ids, max_new_tokens)
        for part, readings in chain(batches, rest):
            for i, reading in zip(part, readings, strict=True):
                out[i] = reading
            tick(len(part))
    return out


def _read_cached(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    order: list[int],
    options: Sequence[Sequence[list[int]]],
    budget: Budget,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> Iterator[tuple[list[int], list[Reading]]]:
    """`read` with a cache: each prompt runs once, after the prefix that all share."""
    prefix, scores = SharedPrefix(model, [prompts[i] for i in order]), dict[int, Scores]()

    def start(part: list[int]) -> CachedPrompts:
        batch = prefix.run([prompts[i] for i in part], keep=keep)
        found = _scores(model, batch, [options[i] for i in part], budget)
        scores.update(zip(part, found, strict=True))
        return batch

    longest = max((len(ids) for i in order for ids in options[i]), default=0)
    extra, lengths = max(max_new_tokens, longest), [len(prompt) for prompt in prompts]
    keep, packed = bool(max_new_tokens) or longest > 1, len(prefix.ids) if prefix.packs else None
    level = not ways(model).pads_left and extra > 1
    if max_new_tokens:
        task = Task([start], lengths, extra, frozenset(stop_ids), max_new_tokens, level, packed)
        for ended in write([model], task, order, budget):
            yield [i for i, _ in ended], [Reading(scores[i], reply) for i, reply in ended]
    else:
        limits: dict[str, Any] = {"lengths": lengths, "extra": extra, "level": level}
        for part, _ in budget.batches(order, start, **limits, packed=packed):
            yield part, [Reading(scores[i], []) for i in part]


def _read_whole(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    order: list[int],
    options: Sequence[Sequence[list[int]]],
    budget: Budget,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> Iterator[tuple[list[int], list[Reading]]]:
    """`read` without a cache: for models, or rows, that cannot use one across passes."""
    spans = [_answer_span(prompts[i], ids) for i in order for ids in options[i]]
    totals = iter(_totals(model, spans, budget, _no_tick))
    scores = {i: tuple(next(totals) for _ in options[i]) for i in order}
    lengths = [len(prompt) for prompt in prompts]

    def work(part: list[int]) -> list[Reading]:
        tokens = _reply_tokens(model, [prompts[i] for i in part], stop_ids, max_new_tokens)
        replies = _replies(len(part), tokens)
        return [Reading(scores[i], reply) for i, reply in zip(part, replies, strict=True)]

    can = ways(model)
    level = can.cache_argument is not None and not can.pads_left
    yield from budget.batches(order, work, lengths=lengths, extra=max_new_tokens, level=level)


def _reply_tokens(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> Iterator[dict[int, int]]:
    """Yield the replies to these prompts token by token, without a prefix shared across batches."""
    if max_new_tokens:
        first, next_logits = begin_replies(model, prompts, max_new_tokens)
        yield from greedy(first, next_logits, stop_ids, max_new_tokens)


def begin_replies(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int
) -> tuple[Tensor, NextLogits]:
    """The logits [row, vocab] after these prompts, and how to continue them."""
    can = ways(model)
    if can.cache_argument is None or can.depends_on_length(max(map(len, prompts)) + max_new_tokens):
        return without_cache(model, prompts)
    if can.extends_cache:
        batch = SharedPrefix(model, prompts).run(prompts)
        return batch.logits, continue_cached(model, batch)
    return step_by_step(model, prompts, can.cache_argument)


def _replies(count: int, tokens: Iterator[dict[int, int]]) -> list[list[int]]:
    replies: list[list[int]] = [[] for _ in range(count)]
    for step in tokens:
        for i, token in step.items():
            replies[i].append(token)
    return replies


@torch.inference_mode()
def stream(
    model: PreTrainedModel, prompt: list[int], *, max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> Iterator[int]:
    """Yield one prompt's greedy reply token by token, the same as in `read`."""
    with for_evaluation(model):
        for tokens in _reply_tokens(model, [prompt], stop_ids, max_new_tokens):
            yield tokens[0]


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-likelihood in nats of each token of an answer; their sum is the score in `read`."""
    with for_evaluation(model):
        spans = [_answer_span(prompt, answer)]
        return [float(x) for x in _token_scores(model, spans, Budget(model), _no_tick)[0]]


def score_answers(
    model: PreTrainedModel,
    items: Sequence[Rendered],
    *,
    batch_size: int | None = None,
    tick: Tick = _no_tick,
) -> list[float]:
    """Log-likelihood in nats of each row's answer with its end token.

    Raises:
        CellError: see `read`.
    """
    return score_spans(model, list(map(Span.of, items)), batch_size=batch_size, tick=tick)


@torch.inference_mode()
def score_spans(
    model: PreTrainedModel,
    spans: Sequence[Span],
    *,
    batch_size: int | None = None,
    tick: Tick = _no_tick,
) -> list[float]:
    """Log-likelihood in nats of each span; rows share at most a prefix.

    Raises:
        CellError: see `read`.
    """
    with for_evaluation(model):
        return _totals(model, spans, Budget(model, batch_size), tick)


@torch.inference_mode()
def score_each(model: PreTrainedModel, spans: Sequence[Span]) -> list[Tensor]:
    """Log-likelihood in nats of each token of each span, in float64.

    Raises:
        CellError: see `read`.
    """
    with for_evaluation(model):
        return _token_scores(model, spans, Budget(model), _no_tick)


def _answer_span(prompt: list[int], answer: list[int]) -> Span:
    return Span([*prompt, *answer], len(prompt), len(prompt) + len(answer))


def _totals(
    model: PreTrainedModel, spans: Sequence[Span], budget: Budget, tick: Tick
) -> list[float]:
    return [float(each.sum()) for each in _token_scores(model, spans, budget, tick)]


def _token_scores(
    model: PreTrainedModel, spans: Sequence[Span], budget: Budget, tick: Tick
) -> list[Tensor]:
    """Log-likelihood of each token of each span, in float64. A span with too many logits is scored
    in pieces."""
    pieces = [
        (number, piece) for number, span in enumerate(spans) for piece in span.cut(budget.logits)
    ]
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][1].ids))
    left, by_piece = [0] * len(spans), dict[int, Tensor]()
    for number, _ in pieces:
        left[number] += 1

    rows, share = [piece.ids for _, piece in pieces], ways(model).extends_cache
    packs = packed_up_to(model) >= max(map(len, rows), default=1)
    first = min((piece.start for _, piece in pieces), default=1)
    packed = common_prefix(rows, (first - 1) * share) if packs and rows else None

    def work(part: list[int]) -> list[Tensor]:
        pack = packs and len(part) > 1
        batch = collate_spans([pieces[i][1] for i in part], share=share, pack=pack, flat=pack)
        batch = batch.to(model.device)
        scores = -token_losses(answer_logits(model, batch), batch.labels).double().cpu()
        if pack:
            return list(torch.split(scores[0], [kept[i] for i in part]))
        scored = batch.labels.cpu() != IGNORE
        return [line[mask] for line, mask in zip(scores, scored, strict=True)]

    lengths = list(map(len, rows))
    kept = [piece.stop - piece.start for _, piece in pieces]
    for part, scores in budget.batches(order, work, lengths=lengths, kept=kept, packed=packed):
        for i, line in zip(part, scores, strict=True):
            by_piece[i] = line
            left[pieces[i][0]] -= 1
        tick(sum(left[number] == 0 for number in {pieces[i][0] for i in part}))
    joined: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] for _ in spans]
    for i, (number, _) in enumerate(pieces):
        joined[number].append(by_piece[i])
    return [torch.cat(parts) for parts in joined]


def _scores(
    model: PreTrainedModel,
    prompts: CachedPrompts,
    candidates: Sequence[Sequence[list[int]]],
    budget: Budget,
) -> list[tuple[float, ...]]:
    """Log-likelihoods of the candidates, one tuple per row; the first token of each is scored by
    the prompt's own logits."""
    flat = [(row, ids) for row, choice in enumerate(candidates) for ids in choice]
    scores = list[float]()
    longest = max((len(ids) for _, ids in flat), default=1)
    width = int(prompts.ends.max()) + longest
    each = max(1, min(budget.tokens // width, budget.together // longest))
    while len(scores) < len(flat):
        part = flat[len(scores) : len(scores) + each]
        owner = torch.tensor([row for row, _ in part], device=prompts.logits.device)
        work = partial(_candidate_scores, model, prompts, owner, [ids for _, ids in part])
        if (result := unless_out_of_memory(work)) is not None:
            scores += result[0]
        elif each == 1:
            raise torch.OutOfMemoryError("one candidate")  # the caller retries with fewer prompts
        else:
            each = (min(each, len(part)) + 1) // 2
    in_order = iter(scores)
    return [tuple(next(in_order) for _ in choice) for choice in candidates]


def _candidate_scores(
    model: PreTrainedModel, prompts: CachedPrompts, owner: Tensor, candidates: list[list[int]]
) -> list[float]:
    ids = torch.full((len(candidates), max(map(len, candidates))), IGNORE)
    for line, candidate in zip(ids, candidates, strict=True):
        line[: len(candidate)] = torch.tensor(candidate)
    ids = ids.to(owner.device)
    likely = prompts.logits.log_softmax(-1)[owner].gather(1, ids[:, :1])[:, 0].double()
    if ids.shape[1] > 1:
        longer = (ids[:, 1] != IGNORE).nonzero()[:, 0]
        fed = ids[longer, :-1].clamp(min=0)  # the token that replaces padding is never read
        rest, _ = follow(model, prompts.rows(owner[longer]), fed)
        likely[longer] -= token_losses(rest, ids[longer, 1:]).double().sum(1)
    return likely.tolist()
