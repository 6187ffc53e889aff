"""AdamW with its states in 32 or 8 bits, its learning-rate schedule, and its step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from backfire.errors import UserError
from backfire.experiment import Train
from backfire.train.microbatch import retry_once

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun

_NORMS_AND_BIASES = (
    *(r"bias", r"layernorm", r"rmsnorm"),
    *(r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"),
)
"""Names that transformers' Trainer treats as norms or biases."""


STATE_BYTES = {"adamw": 8.0, "paged-adamw": 8.0, "adamw-8bit": 2.04, "paged-adamw-8bit": 2.04}
"""Bytes of an optimizer's state per trained weight; in 8 bits, with a scale per 256 of them."""


def first_step_bytes(weights: Mapping[str, torch.nn.Parameter], optimizer: str) -> float:
    """Bytes that the first step adds: the gradients of these weights, and the optimizer's state."""
    return sum(p.numel() * (p.element_size() + STATE_BYTES[optimizer]) for p in weights.values())


def make_optimizer(
    model: torch.nn.Module,
    weights: Mapping[str, torch.nn.Parameter],
    train: Train,
    learning_rate: float,
    num_steps: int,
    *,
    paged: bool,
) -> tuple[torch.optim.Optimizer, Any]:
    """Make AdamW and its learning-rate schedule; `paged`: its state may move to main memory."""
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
        model,
        [group for group in groups if group["params"]],
        train.optimizer if not paged or "paged" in train.optimizer else f"paged-{train.optimizer}",
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


def _adamw(
    model: Any, groups: list[dict[str, Any]], name: str, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer that `Train.optimizer` names; without a GPU nothing is paged.

    Raises:
        UserError: it needs bitsandbytes, which does not load here.
    """
    if groups[0]["params"][0].device.type != "cuda":
        name = name.removeprefix("paged-")
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        from bitsandbytes import optim
    except Exception:
        raise UserError(
            f"train.optimizer '{name}' needs bitsandbytes, which does not load here: "
            "pip install bitsandbytes, or use adamw."
        ) from None
    if name == "paged-adamw":
        return cast(torch.optim.Optimizer, optim.PagedAdamW32bit(groups, **settings))
    kind = optim.PagedAdamW8bit if name.startswith("paged-") else optim.AdamW8bit
    embedding = id(model.get_input_embeddings().weight)  # a class would keep the weight in memory

    class Mixed(kind):  # type: ignore[misc, valid-type]
        """As in transformers, 32 bits for the embedding, whose gradients are too uneven for 8.
        (bitsandbytes' own way to say so keeps the model in memory for ever.)"""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> Any:
            config = super().get_config(gindex, pindex, group)
            wide = id(group["params"][pindex]) == embedding
            return {**config, "optim_bits": 32} if wide else config

    return cast(torch.optim.Optimizer, Mixed(groups, **settings))


def take_step(run: TrainingRun) -> torch.Tensor:
    """Clip the gradients and take the optimizer's step; returns their norm before clipping.

    Raises:
        CellError: memory runs out (`oom`).
    """
    optimizer, size = run.optimizer, sum(p.numel() for p in run.trainable.values())
    sentence = (
        f"Out of memory in the optimizer's step: AdamW keeps "
        f"{STATE_BYTES[run.train.optimizer] * size / 1e9:,.1f} GB of state for "
        f"{size / 1e6:,.0f} M trained weights; train fewer, with method lora or qlora, or set "
        "train.optimizer to paged-adamw-8bit."
    )

    def clip() -> torch.Tensor:
        weights = list(run.trainable.values())
        if not (run.master or run.ranks.sharded):
            return clip_grad_norm_(weights, run.train.clip_norm)
        norm = run.gradients.length()  # torch's would be rounded to 16 bits, or a DTensor
        clip_grads_with_norm_(weights, run.train.clip_norm, norm)
        return norm

    norm = retry_once(clip, sentence)
    first = any(p.grad is not None and not optimizer.state.get(p) for p in run.trainable.values())
    if not first and not run.master:
        optimizer.step()
        return norm
    # The first step allocates the state, and may run out of memory halfway.
    before = steps_taken(optimizer)
    step = partial(run.master.step, optimizer)
    retry_once(step, sentence, between=lambda: revert_partial_step(optimizer, before))
    return norm


def steps_taken(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, float]:
    """Number of optimizer steps of each weight that has a state."""
    return {weight: float(state["step"]) for weight, state in optimizer.state.items() if state}


def revert_partial_step(
    optimizer: torch.optim.Optimizer, before: Mapping[torch.Tensor, float]
) -> None:
    """Prepare an optimizer to retry a step that ran out of memory halfway: clear the gradients of
    weights that were already updated, and delete incomplete states."""
    for weight, state in list(optimizer.state.items()):
        if not float(state.get("step", 0)):  # made for this step
            del optimizer.state[weight]
        elif float(state["step"]) > before.get(weight, 0):
            weight.grad = None
