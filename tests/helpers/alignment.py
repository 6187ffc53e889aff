"""Training with the defenses of the alignment stage, and steps along a direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backfire.base import Rendered
from backfire.experiment import Train
from backfire.registry import build
from backfire.train.loop import TrainingRun
from tests.helpers.training import run

BOOSTER = {"name": "booster", "alpha": 0.3, "strength": 2.0}
VACCINE = {"name": "vaccine", "rho": 0.5}
REPNOISE = {"name": "repnoise", "alpha": 0.5, "beta": 0.2}
ALIGN = [VACCINE, BOOSTER, REPNOISE]


def full(model: Any) -> Any:
    return model.requires_grad_(True)


def lora(model: Any, **knobs: Any) -> Any:
    model = build("methods", {"name": "lora", "rank": 4, **knobs}).attach(model, 0)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # at zero, an adapter's A would have no gradient
            p.data = 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


METHODS: dict[str, Callable[[Any], Any]] = {"full": full, "lora": lora}


def new_cell(
    model: Any, rows: Mapping[str, list[Rendered]], folder: Path, *defenses: Any, **knobs: Any
) -> TrainingRun:
    folder.mkdir(parents=True, exist_ok=True)
    seed, harmful = knobs.pop("seed", 5), knobs.pop("harmful", rows["harmful"])
    settings = {"max_steps": 5, "batch_size": 6, "warmup_share": 0.0, "schedule": "constant"}
    return TrainingRun(
        model,
        rows["align"],
        Train.make({**settings, **knobs}),
        learning_rate=2e-3,
        seed=seed,
        folder=folder,
        name="run",
        defenses=[build("defenses", defense) for defense in defenses],
        harmful=harmful,
    )


def dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    return sum(float((one[n].double() * two[n].double()).sum()) for n in two)


def moved(cell: TrainingRun, direction: Mapping[str, Tensor], scale: float) -> Any:
    """The model with its weights moved along a direction, for the time of a `with`."""

    @contextmanager
    def inside() -> Iterator[None]:
        kept = {n: p.detach().clone() for n, p in cell.trainable.items()}
        with torch.no_grad():
            for name, part in direction.items():
                cell.trainable[name].add_(scale * part)
        yield
        with torch.no_grad():
            for name, weight in kept.items():
                cell.trainable[name].copy_(weight)

    return inside()


def after(model: Any, rows: Any, folder: Path, *defenses: Any, **knobs: Any) -> dict[str, Tensor]:
    cell = new_cell(model, rows, folder, *defenses, **knobs)
    run(cell)
    return cell.weights()


@contextmanager
def outputs_of(modules: Sequence[Any]) -> Iterator[list[Any]]:
    """What these modules put out."""
    found: list[Any] = []
    hooks = [m.register_forward_hook(lambda m, a, out: found.append(out)) for m in modules]
    yield found
    for hook in hooks:
        hook.remove()
