"""The passes of a training step through the model: from rows to gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from backfire.base import Rendered, TrainHook
from backfire.train.batches import token_losses

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun


def accumulate(
    run: TrainingRun, rows: Sequence[Rendered], hooks: Sequence[TrainHook]
) -> torch.Tensor:
    """Accumulate the gradients of the mean loss over all supervised tokens, in micro-batches that
    fit in memory; with several ranks each computes its share of the rows."""
    supervised = max(1, sum(row.num_supervised for row in rows))  # a defense's pass may lack any
    total = torch.zeros((), device=run.device)
    earlier = run.gradients.take() if run.ranks.several else {}  # already summed
    flat = all(type(hook).weigh is TrainHook.weigh for hook in hooks)
    for part in run.micro_batches.split(run.ranks.share(rows)):
        logits, labels = run.logits(part, flat=flat)
        with run.autocast():
            losses = token_losses(logits, labels)
            for hook in hooks:
                losses = hook.weigh(losses, labels, part, logits)
        loss = losses.sum() / supervised
        run.backward(loss)
        total += loss.detach()
    total = run.ranks.summed(run.trainable, total)
    run.gradients.add(earlier)
    return total
