"""Rows of many lengths, and what is compared of a training run at the size of real models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backfire.base import Row
from backfire.registry import build, find, names

TRAINED = [name for name in names("methods") if find("methods", name).make({}).trains]


def rows_of(count: int, source: Any = "sandbox-reviews") -> list[Row]:
    rows = build("datasets", source).load("train")[:count]
    # Answers and inputs of many lengths, behind one opening.
    return [
        Row(f"{source} {r.id}", "Please answer this.", r.prompt[-5 - 7 * (i % 9) :], r.answer)
        for i, r in enumerate(rows)
    ]


def close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 2e-5) -> bool:
    return one.keys() == two.keys() and all(
        torch.allclose(one[n], two[n], rtol=1e-4, atol=tolerance) for n in one
    )


DEFENSES: dict[str, Any] = {
    "lisa": {"name": "lisa", "align_steps": 1, "tune_steps": 1, "free_share": 0},
    "ewc": {"name": "ewc", "strength": 10.0},
    "ldifs": {"name": "ldifs", "strength": 0.1},
    "kl": {"name": "kl", "strength": 0.5},
    "constrained-sft": "constrained-sft",
    "asft": {"name": "asft", "rank": 1},
    "vaccine": {"name": "vaccine", "rho": 0.5},
    "booster": "booster",
    "repnoise": {"name": "repnoise", "alpha": 0.5, "beta": 0.5},
    "crow": "crow",
    "abl": {"name": "abl", "isolate": 0.5},
}


def both_ways(names: Sequence[str | None]) -> list[tuple[str | None, str]]:
    """Each with all weights, and those that reach furthest into the model with an adapter too."""
    return [(n, "full") for n in names] + [(n, "lora") for n in (None, "ewc", "ldifs", "repnoise")]
