"""Small training runs on a CPU, and plain references for their losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backfire.base import Rendered
from backfire.train import steps
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import Precision

CPU = torch.device("cpu")
Rows = dict[str, list[Rendered]]


def exact(model: Any) -> Any:
    """In float64 throughout: Llama's norms would compute in float32."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(norm, module)
    return model.double()


def run(cell: TrainingRun, **options: Any) -> dict[str, Any]:
    """Train one model alone; returns its summary."""
    return train([cell], Precision(CPU, "float32"), **options)[0]


class Kill(Exception):  # noqa: N818
    """Simulates the process being killed."""


def killed_at(step: int) -> Callable[[int, int, str], None]:
    """A progress callback that ends the process at this step."""

    def progress(done: int, total: int, text: str) -> None:
        if done == step and total > 1:
            raise Kill

    return progress


# ------------------------------------------------------------------------------- sets of weights


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def norm(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> float:
    parts = tensors.values() if isinstance(tensors, Mapping) else tensors
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in parts))


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 1e-5) -> bool:
    """Whether the distance is at most `tolerance` times the length of `two`."""
    assert one.keys() == two.keys()
    return norm({n: one[n] - two[n] for n in one}) <= tolerance * norm(two)


# --------------------------------------------------------------------------- losses and gradients


def gradients(
    cell: TrainingRun, batch: Sequence[Rendered] | None = None, size: int = 99
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step on these rows, or on the first batch, as the loop has them;
    `size` rows a pass."""
    cell.micro_batches.rows, cell.autocast = size, Precision(CPU, "float32").autocast
    loss = steps.gradients(cell, cell.rows() if batch is None else list(batch))
    return float(loss), {n: p.grad.clone() for n, p in cell.trainable.items() if p.grad is not None}


def logits_alone(model: Any, item: Rendered) -> Tensor:
    """Logits [token, vocab] of an answer, from the row alone: no padding, no prefix."""
    logits: Tensor = model(input_ids=torch.tensor([item.ids])).logits[0]
    return logits[item.num_prompt - 1 : -1]


def losses_alone(model: Any, item: Rendered) -> Tensor:
    answer = torch.tensor(item.answer_ids)
    return cross_entropy(logits_alone(model, item), answer, reduction="none")


def loss_of(model: Any, batch: Sequence[Rendered]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, row by row and without padding."""
    return torch.cat([losses_alone(model, item) for item in batch]).mean()


def gradient_of(loss: Tensor, cell: TrainingRun) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(cell.trainable.values()), allow_unused=True)
    return {n: g for n, g in zip(cell.trainable, found, strict=True) if g is not None}
