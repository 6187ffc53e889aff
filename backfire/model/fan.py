"""Several models with LoRA adapters on the same base: their weights are in memory once, and their
rows go through its products together.

Each model has its own modules and adapters, and is used as any other. In a pass of the first one,
whose line of tokens is divided among all, each linear layer multiplies all tokens by the base's
weights at once, and the tokens of each model by its own adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backfire.model.batching import same_ways
from backfire.model.fused import (
    Joined,
    join,
    joined_sum,
    low_rank,
    replaced_forwards,
    trained_layers,
)

_HALF = (torch.bfloat16, torch.float16)
Share = tuple[int, int, int]
"""Number of a model, of its tokens in a line, and of those among them that reach the head."""


def twin(base: PreTrainedModel) -> PreTrainedModel:
    """A model with the weights of this one, and modules of its own."""
    tensors: list[Any] = [*base.parameters(), *base.buffers()]
    # bitsandbytes moves 8-bit weights into a state at their first use.
    states = [state for m in base.modules() if (state := vars(m).get("state")) is not None]
    made = copy.deepcopy(base, {id(shared): shared for shared in (*tensors, *states)})
    same_ways(made, base)
    return made


class Fan:
    """Tells the layers of several models whose tokens they are given."""

    def __init__(self) -> None:
        self._shares: Sequence[Share] | None = None

    @contextmanager
    def divided(self, shares: Sequence[Share]) -> Iterator[None]:
        """Within the context the first model is given tokens of several models, in this order."""
        self._shares = shares
        try:
            yield
        finally:
            self._shares = None

    def shares(self, model: int, tokens: int, *, at_head: bool) -> list[tuple[int, int]]:
        """The numbers of the models, and of their tokens among those that a layer of this model is
        given."""
        if self._shares is None:
            return [(model, tokens)]
        return [(number, picked if at_head else own) for number, own, picked in self._shares]


@contextmanager
def fanned(models: Sequence[PreTrainedModel], compute: str) -> Iterator[Fan]:
    """Let models that share a base, and have adapters in the same layers, share its products within
    the context, in which they are trained with products in the type `compute`. In 16 bits each sum
    of base and adapter is rounded once (see `model.fused`).

    Raises:
        ValueError: their adapters are in different layers.
    """
    kind, fan = getattr(torch, compute), Fan()
    heads = [cast(Any, model).get_output_embeddings() for model in models]
    each = [trained_layers(model) for model in models]
    if len({tuple(_names(model, own)) for model, own in zip(models, each, strict=True)}) > 1:
        raise ValueError("The adapters of these models are in different layers.")
    forwards = {}
    with ExitStack() as stack:
        for layers in zip(*each, strict=True):
            joined = join(layers, kind if kind in _HALF else None)
            if joined is not None:
                stack.callback(joined.close)
            at_head = layers[0] is heads[0]
            for number, layer in enumerate(layers):
                place = _Place(fan, layers, joined, number, at_head)
                forwards[layer] = partial(_Place.forward, place)
        stack.enter_context(replaced_forwards(forwards))
        yield fan


def _names(model: nn.Module, layers: Sequence[Any]) -> Iterator[str]:
    chosen = set(map(id, layers))
    return (name for name, module in model.named_modules() if id(module) in chosen)


class _Place:
    """A layer of one of the models, and the same layer of the others."""

    def __init__(
        self, fan: Fan, layers: Sequence[Any], joined: Joined | None, number: int, at_head: bool
    ) -> None:
        self.fan, self.layers, self.joined = fan, layers, joined
        self.number, self.at_head = number, at_head

    def forward(self, x: Tensor) -> Tensor:
        """[..., input] to [..., output]."""
        shares = self.fan.shares(self.number, x[..., 0].numel(), at_head=self.at_head)
        pieces = torch.split(x.flatten(0, -2), [count for _, count in shares])
        pairs = [low_rank(self.layers[n], piece) for (n, _), piece in zip(shares, pieces)]
        return joined_sum(self.layers[self.number], self.joined, x, pairs)
