"""Fine-tuning under a defense, on a model small enough to be followed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backfire.base import Rendered, Row
from backfire.model.load import load_base
from backfire.registry import build
from backfire.rng import stream
from backfire.train import steps
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import Precision
from tests.helpers.training import CPU, Rows, exact, loss_of, weights

Make = Callable[..., TrainingRun]
RATE = 2e-3
LISA = {"name": "lisa", "rho": 5.0, "align_steps": 2, "tune_steps": 3}
ACTIVE: dict[str, dict[str, Any]] = {
    "lisa": LISA,
    "ewc": {"name": "ewc", "strength": 30.0},
    "ldifs": {"name": "ldifs", "strength": 2.0},
    "kl": {"name": "kl", "strength": 2.0},
    "constrained-sft": {"name": "constrained-sft"},
    "asft": {"name": "asft", "strength": 50.0},
    "freeze": {"name": "freeze", "lower_share": 0.5},
    "crow": {"name": "crow"},
    "abl": {"name": "abl", "isolate": 0.2, "early": 0.4, "unlearn": 0.3},
}
"""Each at a strength that shows within a few steps of the tiny model."""
IDLE: dict[str, dict[str, Any]] = {
    "lisa": {"name": "lisa", "align_steps": 0, "rho": 0.0},
    "ewc": {"name": "ewc", "strength": 0.0},
    "ldifs": {"name": "ldifs", "strength": 0.0},
    "kl": {"name": "kl", "strength": 0.0},
    "constrained-sft": {
        "name": "constrained-sft",
        "first_beta": 0.0,
        "early_beta": 0.0,
        "late_beta": 0.0,
    },
    "asft": {"name": "asft", "strength": 0.0},
    "freeze": {"name": "freeze", "lower_share": 0.0},
    "crow": {"name": "crow", "alpha": 0.0},
    "abl": {"name": "abl", "isolate": 0.0},
}
"""Each at strength zero."""


def new_model(tiny: Path, method: str = "full", **knobs: Any) -> Any:
    """The tiny model in float64, as a method leaves it."""
    model = exact(load_base(tiny, torch.float32, CPU))
    if method == "full":
        return model.requires_grad_(True)
    return build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0).double()


def weights_after(cell: TrainingRun, **options: Any) -> dict[str, Tensor]:
    """The weights after training."""
    train([cell], Precision(CPU, "float32"), **options)
    return weights(cell.model)


def begun(cell: TrainingRun) -> TrainingRun:
    """Its defenses have seen the start."""
    steps.begin(cell, Precision(CPU, "float32"))
    return cell


def penalty(cell: TrainingRun) -> float:
    found = cell.hooks[0].penalty(1)
    assert found is not None
    return found.item()


def jolt(cell: TrainingRun, scale: float = 0.03) -> None:
    """Move every trainable weight a little, so that the model is no longer at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in cell.trainable.values():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


def shuffled(rows: Sequence[Rendered], *purpose: Any) -> list[Rendered]:
    out = list(rows)
    stream(5, *purpose).shuffle(out)
    return out


def users(rows: Sequence[Rendered], step: int, size: int = 6) -> list[Rendered]:
    """The user's rows of a step: 24 of them make 4 steps an epoch."""
    epoch, place = divmod(step, len(rows) // size)
    return shuffled(rows, "order", epoch)[place * size : (place + 1) * size]


def by_hand(
    model: Any,
    steps: int,
    batch: Callable[[int], list[Rendered]],
    added: Callable[[int, dict[str, nn.Parameter]], Tensor | float] = lambda step, w: 0.0,
) -> list[dict[str, Tensor]]:
    """Plain training: AdamW, a constant rate, clipping at 1. The weights after each step."""
    model.eval()
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(ours.values(), lr=RATE, weight_decay=0.0)
    out = []
    for step in range(steps):
        optimizer.zero_grad()
        (loss_of(model, batch(step)) + added(step, ours)).backward()
        torch.nn.utils.clip_grad_norm_(ours.values(), 1.0)
        optimizer.step()
        out.append({n: p.detach().clone() for n, p in ours.items()})
    return out


# --------------------------------------------------------------------------------------------- lisa


def is_aligning(step: int) -> bool:
    return step % 5 < 2


def lisas(rows: Rows, step: int) -> list[Rendered]:
    """14 alignment rows make 3 steps a pass, and an alignment state has 2 steps of 5."""
    if not is_aligning(step):
        return users(rows["user"], step)
    turn, place = divmod(2 * (step // 5) + step % 5, 3)
    return shuffled(rows["align"], "lisa", turn)[place * 6 : (place + 1) * 6]


# ----------------------------------------------------------------------------------------- safe mix


def plain_rows(count: int, name: str = "u") -> list[Row]:
    return [Row(f"{name}{i}", f"Ask {name}{i}", answer="Yes") for i in range(count)]


BAD = frozenset({"u1", "u4", "u9", "u16"})
