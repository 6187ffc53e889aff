"""The passes of a training step through the model: from rows to gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from backfire.base import Rendered, TrainHook
from backfire.train.batches import one_run_each, token_losses

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun


def accumulate(
    run: TrainingRun, rows: Sequence[Rendered], hooks: Sequence[TrainHook]
) -> torch.Tensor:
    """Accumulate the gradients of the mean loss over all supervised tokens, in micro-batches that
    fit in memory; with several ranks each computes its share of the rows."""
    ranks, supervised = run.ranks, num_supervised(rows)
    total = torch.zeros((), device=run.device)
    earlier = run.gradients.take() if ranks.several else {}  # already summed
    flat = reads_flat(hooks)
    for part, counts in _passes(run, rows):
        before = run.heap.used()
        # Logits are not in memory beside the backward pass, or the next pass.
        loss = loss_of(run, part, hooks, *run.logits(part, flat=flat)) / supervised
        if not counts:
            loss = loss * 0
        run.heap.tidy(before)
        run.backward(loss)
        total += loss.detach()
    total = ranks.summed(run.trainable, total)
    run.gradients.add(earlier)
    return total


def num_supervised(rows: Sequence[Rendered]) -> int:
    """Number of tokens over which the loss of a step is the mean; at least 1, since the pass of a
    defense may lack any."""
    return max(1, sum(row.num_supervised for row in rows))


def reads_flat(hooks: Sequence[TrainHook]) -> bool:
    """Whether no hook reads the losses of tokens, so that these need no rows."""
    return all(type(hook).weigh is TrainHook.weigh for hook in hooks)


def loss_of(
    run: TrainingRun,
    rows: Sequence[Rendered],
    hooks: Sequence[TrainHook],
    logits: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The sum of the losses of these rows' tokens, as the hooks weigh them; `logits` [row, answer,
    vocab] predict `labels` [row, answer]."""
    with run.autocast():
        losses = token_losses(logits, labels)
        for hook in hooks:
            losses = hook.weigh(losses, labels, rows, logits)
    return losses.sum()


def _passes(
    run: TrainingRun, rows: Sequence[Rendered]
) -> Iterator[tuple[Sequence[Rendered], bool]]:
    """The rows of each pass of this rank, and whether they count. With sharded weights all ranks
    run the model equally often: one that has fewer passes repeats a row for nothing."""
    parts = run.micro_batches.split(run.ranks.share(rows))
    if not run.ranks.sharded:
        yield from ((part, True) for part in parts)
        return
    own = [(part, True) for split in parts for part in one_run_each(run.model, split)]
    most = int(run.ranks.largest(len(own)))  # agreed on before the first pass
    yield from own + [(rows[:1], False)] * (most - len(own))
