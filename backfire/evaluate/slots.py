"""Greedy replies to many prompts in a batch that stays full.

Keys and values are in one buffer, so that a new token copies only itself. All rows end at the same
column. When a reply ends, the last row takes its place, and the next prompts join at the end. A
second model may read the same tokens, in a buffer of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from backfire.evaluate.budget import Budget
from backfire.evaluate.prompts import CachedPrompts
from backfire.model.batching import ways
from backfire.train.microbatch import unless_out_of_memory

SPARE = 32
"""Columns beyond those that the longest row needs; when all are used, the rows move back."""
Start = Callable[[list[int]], CachedPrompts]
"""Runs the prompts with these numbers."""
Choose = Callable[[list[int], list[Tensor]], Sequence[int | None]]
"""The next token of the reply to each of these prompts, from the logits [row, vocab] of each model;
None ends the reply."""


@dataclass
class Line:
    """A prompt and its reply so far."""

    row: int
    """Number of the prompt."""
    end: int
    """Position of the prompt's last token."""
    begin: int
    """Column of the prompt's first token."""
    reply: list[int] = field(default_factory=list)


def likeliest(rows: list[int], logits: list[Tensor]) -> Sequence[int | None]:
    return cast(Sequence[int], logits[0].argmax(-1).tolist())


@dataclass(frozen=True)
class Task:
    """What to write."""

    starts: Sequence[Start]
    """One for each model."""
    lengths: Sequence[int]
    """Tokens of each prompt."""
    extra: int
    """Most tokens that follow a prompt."""
    stop_ids: Collection[int]
    max_new_tokens: int
    level: bool
    """Whether only prompts of one length may run together."""
    packed: int | None = None
    """Tokens of the prefix behind which prompts run end to end; None if they are padded."""
    choose: Callable[[], Choose] = lambda: likeliest
    """Makes what chooses the tokens; again where replies begin anew, since memory ran out."""


def write(
    models: Sequence[PreTrainedModel], task: Task, order: Sequence[int], budget: Budget
) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield rows that ended together, each with its reply; all models read its tokens. `order` is
    longest first.

    Raises:
        CellError: memory runs out at one row.
    """
    waiting = deque(order)
    while waiting:
        slots = Slots(models, task, budget, waiting)
        while slots.lines or (waiting and not slots.outgrown()):
            if (result := unless_out_of_memory(slots.turn)) is None:
                again = [*(line.row for line in slots.lines), *waiting]
                waiting = deque(sorted(again, key=lambda row: -task.lengths[row]))
                budget.shrink(slots.rows, slots.columns)
                break
            if result[0]:
                yield result[0]


class Slots:
    """The rows that are decoded together."""

    def __init__(
        self, models: Sequence[PreTrainedModel], task: Task, budget: Budget, waiting: deque[int]
    ) -> None:
        self.models, self.task, self.budget, self.waiting = models, task, budget, waiting
        self.choose = task.choose()
        self.columns = task.lengths[waiting[0]] + task.extra + SPARE
        self.rows = min(budget.fitting(self.columns), len(waiting))
        """Most rows."""
        self.lines = list[Line]()
        self._end = 0  # column after the last token of every row
        self._caches = list[DynamicCache]()

    def turn(self) -> list[tuple[int, list[int]]]:
        """Start the next prompts if there is room, else run one token of every row; returns the
        rows that ended."""
        if part := self._next():
            begun = [start(part) for start in self.task.starts]
            for row, end in zip(part, begun[0].ends.tolist(), strict=True):
                self.waiting.popleft()
                self.lines.append(Line(row, end, 0))
            self._join(begun)
            lines, logits = self.lines[-len(part) :], [prompts.logits for prompts in begun]
        else:
            lines, logits = self.lines, self._step()
        ended = set[int]()
        tokens = self.choose([line.row for line in lines], logits)
        for line, token in zip(lines, tokens, strict=True):
            ends = token is None or token in self.task.stop_ids
            if token is not None and not ends:
                line.reply.append(token)
            if ends or len(line.reply) == self.task.max_new_tokens:
                ended.add(line.row)
        done = [(line.row, line.reply) for line in lines if line.row in ended]
        self._leave(ended)
        return done

    def _next(self) -> list[int]:
        """The prompts that start now; none until a quarter of the rows is free."""
        free, lengths = self.rows - len(self.lines), self.task.lengths
        if not self.waiting or (self.lines and free < self.rows / 4):
            return []
        if self.lines and (self.task.level or self.outgrown()):
            return []  # until all rows have ended
        longest = lengths[self.waiting[0]]
        most = min(free, self.budget.at_once(longest, self.task.packed))
        first = list(islice(self.waiting, most))
        return [row for row in first if not self.task.level or lengths[row] == longest]

    def outgrown(self) -> bool:
        """Whether a new buffer would hold twice as many of the next prompts, which are shorter."""
        columns = self.task.lengths[self.waiting[0]] + self.task.extra + SPARE
        return min(self.budget.fitting(columns), len(self.waiting)) >= 2 * self.rows

    def _join(self, begun: Sequence[CachedPrompts]) -> None:
        """Copy the keys and values of the last rows into each model's buffer."""
        width, start = begun[0].cache.get_seq_length(), len(self.lines) - len(begun[0].ends)
        if not self._caches:
            self._caches = [_buffered(one.cache, self.rows, self.columns) for one in begun]
        if not start:
            self._end = width
        elif self._end < width:
            self._move(self.lines[:start], width)
        for line in self.lines[start:]:
            line.begin = self._end - line.end - 1
        for layer, new in self._layers([prompts.cache for prompts in begun]):
            layer.put(start, self._end - width, new)

    def _step(self) -> list[Tensor]:
        """Run the last token of every reply; returns each model's logits [row, vocab] after it."""
        if self._end == self.columns:
            self._move(self.lines, self._end - min(line.begin for line in self.lines))
        begins, device = [line.begin for line in self.lines], self.models[0].device
        first = min(begins)
        for layer, _ in self._layers():
            layer.show(len(begins), first, self._end)
        self._end += 1
        mask, extra = dict[str, Any](), dict[str, Any]()
        if max(begins) > first:
            columns = torch.arange(first, self._end, device=device)
            starts = torch.tensor(begins, device=device)[:, None]
            mask["attention_mask"] = (columns >= starts).long()
            places = [[line.end + len(line.reply)] for line in self.lines]
            extra["position_ids"] = torch.tensor(places, device=device)
        ids = torch.tensor([line.reply[-1:] for line in self.lines], device=device)
        logits = list[Tensor]()
        for model, cache in zip(cast(Any, self.models), self._caches, strict=True):
            given = {**mask, **(extra if ways(model).takes_positions else {})}
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
            logits.append(cast(Tensor, out.logits)[:, -1].float())
        return logits

    def _leave(self, ended: set[int]) -> None:
        """Remove these rows; the last ones take their places."""
        kept = len(self.lines) - len(ended)
        holes = [place for place in range(kept) if self.lines[place].row in ended]
        movers = [
            place for place in range(kept, len(self.lines)) if self.lines[place].row not in ended
        ]
        if holes:
            first = min(self.lines[place].begin for place in movers)
            for layer, _ in self._layers():
                layer.replace(holes, movers, first, self._end)
        for hole, mover in zip(holes, movers, strict=True):
            self.lines[hole] = self.lines[mover]
        del self.lines[kept:]

    def _move(self, lines: Sequence[Line], end: int) -> None:
        """Move these first rows so that they end at this column."""
        first, by = min(line.begin for line in lines), end - self._end
        for layer, _ in self._layers():
            layer.move(len(lines), first, self._end, by)
        for line in lines:
            line.begin += by
        self._end = end

    def _layers(self, others: Sequence[DynamicCache] = ()) -> Iterator[tuple[_BufferedLayer, Any]]:
        """The layers that store something, each with that of another cache."""
        for cache, other in zip(self._caches, others or self._caches, strict=True):
            for layer, its in zip(cache.layers, other.layers, strict=True):
                if isinstance(layer, _BufferedLayer):
                    yield layer, its


def _buffered(like: DynamicCache, rows: int, tokens: int) -> DynamicCache:
    """An empty cache with the layers of another; a layer that stores nothing stays as it is."""
    cache = DynamicCache()
    for layer in cast(list[DynamicLayer], like.layers):
        holds = layer.keys is not None and layer.keys.numel() > 0
        cache.layers.append(_BufferedLayer(layer, rows, tokens) if holds else DynamicLayer())
    return cache


class _BufferedLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
    """Keys and values are views into buffers [row, head, column, size]."""

    def __init__(self, like: DynamicLayer, rows: int, tokens: int) -> None:
        super().__init__()
        pair = cast(tuple[Tensor, Tensor], (like.keys, like.values))
        self.lazy_initialization(*pair)
        # Zeros: attention multiplies what it masks by 0, and 0 * NaN is NaN.
        self._buffers = [t.new_zeros(rows, t.shape[1], tokens, t.shape[3]) for t in pair]

    def show(self, rows: int, first: int, end: int) -> None:
        """Let the model see these rows and columns."""
        self._first, self._end = first, end
        self.keys, self.values = (part[:rows, :, first:end] for part in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, end = len(key_states), self._end + key_states.shape[-2]
        for part, new in zip(self._buffers, (key_states, value_states), strict=True):
            part[:rows, :, self._end : end] = new
        self.show(rows, self._first, end)
        return self.keys, self.values

    def put(self, row: int, column: int, new: Any) -> None:
        for part, other in zip(self._buffers, (new.keys, new.values), strict=True):
            part[row : row + len(other), :, column : column + other.shape[-2]] = other

    def replace(self, holes: list[int], movers: list[int], first: int, end: int) -> None:
        for part in self._buffers:
            part[holes, :, first:end] = part[movers, :, first:end]

    def move(self, rows: int, first: int, end: int, by: int) -> None:
        for part in self._buffers:
            part[:rows, :, first + by : end + by] = part[:rows, :, first:end].clone()
