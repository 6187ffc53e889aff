"""Useful FLOPs of a training run, and the measured peak of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from backfire.train.batches import common_prefix

if TYPE_CHECKING:
    from backfire.commands.memory import Size
    from benchmarks.cells import Cell

_WIDTH = 2048


def useful_flops(size: Size, rows: Iterable[tuple[int, int]], *, full: bool) -> float:
    """Useful FLOPs of training once on rows of these (tokens, supervised tokens).

    Forward and backward through every weight (6 a token where it is trained, 4 where it is frozen),
    the head for supervised positions only, causal attention (6 x layers x length x width a token).
    No padding, no recomputation. A prefix that rows share counts for each of them.
    """
    each, total = 6 if full else 4, 0.0
    body = each * size.linear + (0 if full else 6 * size.trainable)
    for tokens, supervised in rows:
        total += tokens * (body + 6 * size.layers * tokens * size.hidden)
        total += supervised * each * size.vocabulary * size.hidden
    return total


def least_flops(size: Size, rows: Sequence[list[int]], read: int, *, trains: bool) -> float:
    """The FLOPs of one pass over these rows that nothing can spare: as `useful_flops` of an
    adapter, but a prefix that all rows share counts once; without `trains`, forward only.

    Args:
        rows: token ids.
        read: number of positions that go through the head.
    """
    prefix = common_prefix(rows, min(map(len, rows)))
    positions = prefix + sum(len(row) - prefix for row in rows)
    pairs = prefix**2 + sum(len(row) ** 2 - prefix**2 for row in rows)
    linear, adapter, attention = (4, 6, 6) if trains else (2, 2, 2)
    body = positions * (linear * size.linear + adapter * size.trainable)
    body += attention * size.layers * size.hidden * pairs
    return body + read * linear * size.vocabulary * size.hidden


def measured_peak(dtype: torch.dtype, device: str = "cpu", repetitions: int = 5) -> float:
    """FLOP/s of square matrix products on the device, on a CPU with the current number of threads:
    the median of torch's own, or of the faster library's that backfire uses, whichever is
    higher."""
    from backfire.model.products import linear

    width = _WIDTH if device == "cpu" else 4 * _WIDTH
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for product in (torch.matmul, linear):
        product(a, b)
        seconds = []
        for _ in range(repetitions):
            begin = time.perf_counter()
            product(a, b)[0, 0].item()  # a GPU is waited for
            seconds.append(time.perf_counter() - begin)
        best = max(best, 2 * width**3 / median(seconds))
    return best


def mfu(cell: Cell, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Useful FLOPs of the cell's training, the measured peak of each side's type of products, and
    the share of it that each side reaches; `seconds` are those of the training steps by side."""
    from backfire.commands.memory import size

    rows = [(len(item.ids), len(item.answer_ids)) for item in cell.rendered()[0]]
    shape, experiment = size(cell.experiment, cell.base), cell.experiment
    full = experiment.method.name == "full"
    flops = experiment.train.epochs * useful_flops(shape, rows, full=full)
    ours = experiment.train.compute
    peaks = dict.fromkeys(seconds, cell.baseline_compute or ours) | {"backfire": ours}
    peak = {name: measured_peak(getattr(torch, name)) for name in {*peaks.values()}}
    shares = {who: flops / (seconds[who] * peak[peaks[who]]) for who in seconds}
    return {"useful_flops": flops, "peak": peak, "peak_of": peaks, "useful_mfu": shares}
