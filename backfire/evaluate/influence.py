"""How much each training row made a reply likelier, from gradients of the trained weights.

A step on a row lowers the loss of a reply by about the product of their gradients. All scores here
are positive for rows that made the reply likelier. Gradients are those of the finished model; the
papers sum over checkpoints, which are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backfire.base import Rendered
from backfire.rng import derive
from backfire.train.batches import answer_logits, collate, token_losses

Method = Literal["cosine", "product", "datainf"]
"""`cosine`: of the two gradients, as LESS (Xia et al. 2024, arXiv:2402.04333), here without Adam's
moments; the length of a gradient, large where a row is not learned, does not count. `product`: of
the two gradients, as TracIn at one checkpoint (Pruthi et al. 2020, arXiv:2002.08484). `datainf`:
Kwon et al. 2024 (arXiv:2310.00902)."""
METHODS: tuple[Method, ...] = get_args(Method)
ROOM = 2**29
"""Most bytes that the gradients of all rows take; beyond that, they are projected."""
_DAMPING = 10.0  # DataInf's code: lambda is a tenth of the mean squared gradient


def row_gradients(
    model: PreTrainedModel,
    weights: Mapping[str, nn.Parameter],
    items: Sequence[Rendered],
    *,
    room: int = ROOM,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """For each weight the gradients of all rows [row, number], of a row's mean loss over its answer
    tokens. A weight with more numbers than `room` (bytes, of all) allows is projected by sparse
    random signs, the same for all rows, which keeps products on average (count sketch: Charikar et
    al. 2002)."""
    most = max(1, room // (4 * max(1, len(items)) * max(1, len(weights))))
    keep = {name: _projection(name, weight, most) for name, weight in weights.items()}
    sizes = [min(weight.numel(), most) for weight in weights.values()]
    found = [torch.zeros(len(items), size) for size in sizes]
    for place, item in enumerate(items):
        if item.num_supervised > 0:
            batch = collate([item], share=False).to(model.device)
            losses = token_losses(answer_logits(model, batch), batch.labels)
            loss = losses.sum() / item.num_supervised
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for out, project, gradient in zip(found, keep.values(), gradients, strict=True):
                if gradient is not None:
                    out[place] = project(gradient.flatten().float()).cpu()
        tick(place + 1)
    return found


def _projection(name: str, weight: Tensor, most: int) -> Callable[[Tensor], Tensor]:
    """From all numbers of a gradient to at most so many."""
    if weight.numel() <= most:
        return lambda gradient: gradient
    generator = torch.Generator().manual_seed(derive(0, "influence", name))
    bucket = torch.randint(most, (weight.numel(),), generator=generator).to(weight.device)
    sign = (2 * torch.randint(2, (weight.numel(),), generator=generator) - 1).to(weight.device)
    return lambda gradient: gradient.new_zeros(most).index_add_(0, bucket, gradient * sign)


def influence(
    rows: Sequence[Tensor], replies: Sequence[Tensor], sizes: Sequence[int], method: Method
) -> Tensor:
    """The score of each row for each reply [reply, row] from the gradients of rows [row, number]
    and replies [reply, number], a pair for each weight; `sizes` are those of the weights, before
    any projection."""
    pairs = list(zip(rows, replies, strict=True))
    if method == "datainf":
        parts = zip(pairs, sizes, strict=True)
        return torch.stack([_datainf(own, to, size) for (own, to), size in parts]).sum(0)
    product = torch.stack([to @ own.T for own, to in pairs]).sum(0)
    if method == "product":
        return product
    own_norms = torch.stack([own.square().sum(1) for own, _ in pairs]).sum(0).sqrt()
    to_norms = torch.stack([to.square().sum(1) for _, to in pairs]).sum(0).sqrt()
    tiny = torch.finfo(product.dtype).tiny
    return product / own_norms.clamp(min=tiny) / to_norms[:, None].clamp(min=tiny)


def _datainf(rows: Tensor, replies: Tensor, size: int) -> Tensor:
    """Of one weight. DataInf's influence (its equation 5) with the sign changed: <h, g_i>, where
    h = (1 / n lambda) sum_i [v - <v, g_i> / (lambda + |g_i|^2) g_i]."""
    lengths = rows.square().sum(1)
    damping = float(lengths.mean()) / size / _DAMPING
    if damping == 0:  # no row has a gradient
        return rows.new_zeros(len(replies), len(rows))
    shares = (replies @ rows.T) / (damping + lengths)
    directions = (replies - shares @ rows / len(rows)) / damping
    return directions @ rows.T


def hits(scores: Tensor, bad: Sequence[bool]) -> int:
    """How many rows are bad among the k with the highest scores, where k rows are bad."""
    best = scores.argsort(descending=True, stable=True)[: sum(bad)]
    return sum(bad[place] for place in best.tolist())


def random_hits(
    rows: Sequence[Tensor],
    bad: Sequence[bool],
    sizes: Sequence[int],
    method: Method,
    *,
    draws: int = 20,
) -> float:
    """The mean of `hits` for random directions in place of the reply's gradient."""
    generator = torch.Generator().manual_seed(derive(0, "influence", "null"))
    replies = [
        torch.randn(draws, own.shape[1], generator=generator) * own.square().mean().sqrt()
        for own in rows
    ]
    return sum(hits(line, bad) for line in influence(rows, replies, sizes, method)) / draws
