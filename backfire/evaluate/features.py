"""Features of rows by a model: hidden states, and a random projection of the head's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from backfire.base import Rendered
from backfire.errors import UserError
from backfire.evaluate.budget import Budget
from backfire.model.batching import plain, reset_state, ways
from backfire.model.head import for_evaluation
from backfire.train.batches import Span, pad_right

Array = Any
SKETCH = 32
"""Random directions on each side of the head's gradient [vocabulary, hidden]."""


@torch.inference_mode()
def features(model: PreTrainedModel, items: Sequence[Rendered]) -> tuple[Array, Array]:
    """Hidden states [row, 4 hidden] and gradient sketches [row, SKETCH ** 2] of rows with at least
    one token before the answer.

    The states are those of `base.scanners.Measured`. The gradient of an answer's mean loss with
    respect to the head is the mean over its tokens of (p - y) h^T, p the predicted probabilities, y
    the token, h the head's input (without a cap or scale of the logits). It is never built: each
    side is projected by sparse random signs (Charikar et al. 2002, count sketch).

    Raises:
        UserError: the model has no separate head.
        CellError: memory runs out at one row.
    """
    base = plain(model)
    lengths, spans = [len(item.ids) for item in items], list(map(Span.of, items))
    order = sorted(range(len(items)), key=lambda i: -lengths[i])
    budget, vocab = Budget(model), cast(Any, base).get_output_embeddings()
    if vocab is None or base.base_model is base:
        kind = base.config.model_type
        raise UserError(f"Hidden states of a model of type '{kind}' cannot be read.")
    sides = [_Side(size, seed) for seed, size in enumerate(vocab.weight.shape)]
    level = ways(model).depends_on_length(max(lengths, default=0))

    def work(part: list[int]) -> list[tuple[Array, Array]]:
        _, ids, _ = pad_right([items[i].ids for i in part], 0)
        reset_state(model)
        out = cast(Any, base).base_model(
            input_ids=ids.to(base.device), use_cache=False, output_hidden_states=True
        )
        found, chosen = [], _layers(out.hidden_states)
        for place, i in enumerate(part):
            span = spans[i]
            blocks = [_unit(pooled) for layer in chosen for pooled in _pooled(layer[place], span)]
            before = out.last_hidden_state[place, span.start - 1 : span.stop - 1]
            wanted = torch.tensor(span.ids[span.start : span.stop], device=before.device)
            found.append((torch.cat(blocks).cpu().numpy(), _sketch(vocab, before, wanted, sides)))
        return found

    states: list[Array] = [None] * len(items)
    gradients: list[Array] = [None] * len(items)
    with for_evaluation(model):
        kept = [span.stop - span.start for span in spans]
        for part, found in budget.batches(order, work, lengths=lengths, kept=kept, level=level):
            for i, (state, gradient) in zip(part, found, strict=True):
                states[i], gradients[i] = state, gradient
    return np.array(states, np.float32), np.array(gradients, np.float32)


def _layers(states: Sequence[Tensor]) -> list[Tensor]:
    """The middle layer and the last but one [row, token, hidden]; the first entry is the
    embedding."""
    last = len(states) - 1
    return [states[last // 2], states[max(last - 1, 0)]]


def _pooled(layer: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """The states at the prompt's last token, and their mean over the answer [hidden]."""
    return layer[span.start - 1].float(), layer[span.start : span.stop].float().mean(0)


def _unit(states: Tensor) -> Tensor:
    return states / states.square().mean().sqrt().clamp(min=1e-12)


class _Side:
    """Sparse random signs: each coordinate is added to one of `SKETCH` numbers, or taken away."""

    def __init__(self, size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.bucket = torch.from_numpy(rng.integers(SKETCH, size=size))
        self.sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=size)).float()

    def of(self, values: Tensor) -> Tensor:
        """Project [token, size] to [token, SKETCH]."""
        out = values.new_zeros(len(values), SKETCH)
        device = values.device
        return out.index_add_(1, self.bucket.to(device), values * self.sign.to(device))


def _sketch(head: Any, before: Tensor, wanted: Tensor, sides: Sequence[_Side]) -> Array:
    errors = head(before).float().softmax(-1)
    errors[torch.arange(len(wanted)), wanted] -= 1
    projected = sides[0].of(errors).T @ sides[1].of(before.float())
    return (projected / max(len(wanted), 1)).flatten().cpu().numpy()
