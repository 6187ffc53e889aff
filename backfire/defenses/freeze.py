from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from pydantic import Field

from backfire.base import TrainDefense, TrainHook
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import stream

if TYPE_CHECKING:
    from backfire.train.loop import TrainingRun


@register("freeze")
class Freeze(TrainDefense):
    """Freezes part of the weights that the method would train: lower layers (Lee et al. 2019,
    arXiv:1911.03090), a middle range of layers (the "safety layers" of Li et al. 2025,
    arXiv:2408.17003), or any weights by name.

    Frozen weights get no gradient and no weight decay, and do not count in the clipped norm. Null
    control: about as many weights are frozen (as closely as whole tensors allow), but in tensors
    drawn at random: the same loss of capacity without the choice of layers.
    """

    lower_share: float = Field(0.5, ge=0, le=1)
    """Share of the layers that is frozen, from the input up (Lee et al.: tuning the upper quarter
    reaches nine tenths of the quality; one half is our choice)."""
    first_layer: int | None = Field(None, ge=0)
    """Also freezes the layers from this one on, counted from 0, up to `last_layer`."""
    last_layer: int | None = Field(None, ge=0)
    """Also freezes the layers from `first_layer` up to and including this one."""
    which: tuple[str, ...] = ()
    """Also freezes weights whose names match such a pattern: `*embed*`, `*.mlp.*`."""

    def hook(self, run: TrainingRun) -> TrainHook:
        names = self._chosen(list(run.trainable), run.model.config.num_hidden_layers)
        if self.null:
            sizes = {name: p.numel() for name, p in run.trainable.items()}
            names = _at_random(sizes, sum(sizes[name] for name in names), run.seed)
        if len(names) == len(run.trainable):
            raise UserError(f"{self.label()}: nothing would be left to train.")
        for name in names:
            # Without a gradient the optimizer skips it, weight decay included.
            run.trainable.pop(name).requires_grad_(False)
        return TrainHook()

    def _chosen(self, names: Sequence[str], depth: int) -> list[str]:
        layers = set(range(round(self.lower_share * depth)))
        if self.first_layer is not None or self.last_layer is not None:
            last = depth - 1 if self.last_layer is None else self.last_layer
            if not (self.first_layer or 0) <= last < depth:
                raise UserError(f"{self.label()}: the model has layers 0 to {depth - 1}.")
            layers |= set(range(self.first_layer or 0, last + 1))
        for pattern in self.which:
            if not any(fnmatch(name, pattern) for name in names):
                raise UserError(
                    f"{self.label()}: no trained weight matches '{pattern}'; one of them is named "
                    f"{names[0]}."
                )
        return [
            name
            for name in names
            if _layer(name) in layers or any(fnmatch(name, pattern) for pattern in self.which)
        ]


def _layer(name: str) -> int | None:
    """Return the number of the layer that a weight belongs to: the first number in its name."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _at_random(sizes: dict[str, int], budget: int, seed: int) -> list[str]:
    """Draw tensors with at most `budget` weights in total, until no other one fits."""
    names, drawn = list(sizes), list[str]()
    stream(seed, "freeze").shuffle(names)
    for name in names:
        if sizes[name] <= budget:
            budget -= sizes[name]
            drawn.append(name)
    return drawn
