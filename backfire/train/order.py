"""Which rows a training step has: a function of the seed and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from backfire.base import Rendered
from backfire.experiment import Train
from backfire.rng import stream
from backfire.train.microbatch import by_length

_WINDOW = 50  # steps whose rows are sorted by length together, as in transformers


def steps_of(
    items: Sequence[Rendered], train: Train, seed: int, epoch: int
) -> list[list[Rendered]]:
    """The rows of each step of an epoch."""
    rng, size, rows = stream(seed, "order", epoch), train.batch_size, list(items)
    rng.shuffle(rows)
    if train.order == "by-length":
        window = _WINDOW * size
        windows = [rows[i : i + window] for i in range(0, len(rows), window)]
        rows = [row for part in windows for row in by_length(part)]
    steps = [rows[i : i + size] for i in range(0, len(rows), size)]
    if train.order == "by-length":
        rng.shuffle(steps)
    return steps


def drawn(
    rows: Sequence[Rendered], size: int, seed: int, step: int, purpose: str
) -> list[Rendered]:
    """A batch of at most `size` of these rows for a step; every pass over them has a new order."""
    size = min(size, len(rows))
    per_pass = math.ceil(len(rows) / size)  # the last batch of a pass may be smaller
    turn, place = divmod(step, per_pass)
    order = list(range(len(rows)))
    stream(seed, purpose, turn).shuffle(order)
    return [rows[i] for i in order[place * size : (place + 1) * size]]
