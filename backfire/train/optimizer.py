"""AdamW, and what its learning rate does over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import get_scheduler

from backfire.experiment import Train


def optimization(
    weights: Sequence[torch.nn.Parameter],
    train: Train,
    learning_rate: float,
    num_steps: int,
    *,
    paged: bool,
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and what its learning rate does over the steps."""
    # Norms and biases are not decayed, as in transformers.
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = _adamw(
        [group for group in groups if group["params"]],
        paged,
        lr=learning_rate,
        betas=(0.9, train.beta2),
    )
    # What transformers calls plainly `constant` would leave out the warm-up without a word.
    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    final = {"min_lr_rate": train.final_share} if train.schedule == "cosine" else None
    scheduler = get_scheduler(
        names.get(train.schedule, train.schedule),
        optimizer,
        round(train.warmup_share * num_steps),
        num_steps,
        scheduler_specific_kwargs=final,
    )
    return optimizer, scheduler


def _adamw(groups: list[dict[str, Any]], paged: bool, **settings: Any) -> torch.optim.Optimizer:
    if not paged:
        return torch.optim.AdamW(groups, fused=True, **settings)
    from bitsandbytes.optim import PagedAdamW32bit

    return cast(torch.optim.Optimizer, PagedAdamW32bit(groups, **settings))
