"""AdamW, and what its learning rate does over the steps."""

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
"""What transformers' Trainer takes for a norm or a bias, by its name."""


def optimization(
    model: torch.nn.Module,
    weights: Mapping[str, torch.nn.Parameter],
    train: Train,
    learning_rate: float,
    num_steps: int,
    *,
    paged: bool,
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and what its learning rate does over the steps."""
    # Norms and biases are not decayed, as in transformers; DoRA's lengths and gates are.
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


def steps_taken(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, float]:
    """Of each weight that has a state."""
    return {weight: float(state["step"]) for weight, state in optimizer.state.items() if state}


def unmoved(optimizer: torch.optim.Optimizer, before: Mapping[torch.Tensor, float]) -> None:
    """Make an optimizer whose step ended in the middle, as memory ran out, fit to take it again:
    without the gradients of weights that have moved, and without states that were half made."""
    for weight, state in list(optimizer.state.items()):
        if not {"exp_avg_sq", "state2"} & state.keys():  # AdamW's last, and bitsandbytes'
            del optimizer.state[weight]
        elif float(state["step"]) > before.get(weight, 0):
            weight.grad = None
