"""AdamW and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from backfire.experiment import Train

_NORMS_AND_BIASES = (
    *(r"bias", r"layernorm", r"rmsnorm"),
    *(r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"),
)
"""Names that transformers' Trainer treats as norms or biases."""


def make_optimizer(
    model: torch.nn.Module,
    weights: Mapping[str, torch.nn.Parameter],
    train: Train,
    learning_rate: float,
    num_steps: int,
    *,
    paged: bool,
) -> tuple[torch.optim.Optimizer, Any]:
    """Make AdamW and its learning-rate schedule."""
    # No weight decay for norms and biases, as in transformers; DoRA's magnitudes and gates decay.
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NORMS_AND_BIASES))
    groups = [
        {
            "params": [p for name, p in weights.items() if (name in decayed) == decays],
            "weight_decay": train.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = _adamw(
        [group for group in groups if group["params"]],
        paged,
        lr=learning_rate,
        betas=(0.9, train.beta2),
    )
    # The schedule that transformers calls `constant` silently ignores the warm-up.
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


def steps_taken(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, float]:
    """Number of optimizer steps of each weight that has a state."""
    return {weight: float(state["step"]) for weight, state in optimizer.state.items() if state}


def revert_partial_step(
    optimizer: torch.optim.Optimizer, before: Mapping[torch.Tensor, float]
) -> None:
    """Prepare an optimizer to retry a step that ran out of memory halfway: clear the gradients of
    weights that were already updated, and delete incomplete states."""
    for weight, state in list(optimizer.state.items()):
        if not {"exp_avg_sq", "state2"} & state.keys():  # AdamW's last, and bitsandbytes'
            del optimizer.state[weight]
        elif float(state["step"]) > before.get(weight, 0):
            weight.grad = None
