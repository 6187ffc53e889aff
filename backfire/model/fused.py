"""LoRA adapters with fewer operations and one rounding.

PEFT adds an adapter's output to the base's output. In 16 bits that is wrong for a small adapter:
the base's output is already rounded, and a number below half of its last bit, which is 0.2 to 0.4 %
of it in bfloat16, changes nothing. A new adapter is that small, so most of its first steps do not
reach the loss (135M model, learning rate 2e-4, four steps: loss 1.94 instead of 1.26), and what it
learned is not evaluated. Here one product yields both, [x, x A^T] [W, s B]^T: sums are in float32
inside of a product, and are rounded once.

The other layers, and the head, are fused in evaluation only: they multiply by A, and add the
product with the scaled B to the base's output, in place if both have one type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def fused_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Fuse the active LoRA adapters of all linear layers within the context, which must be without
    gradients. Layers with DoRA, a bias, active dropout or merged weights are unchanged."""
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    head = model.get_output_embeddings()  # its logits are not rounded (see `model.head`)
    with ExitStack() as stack:
        inner = [layer for layer in layers if layer is not head]
        rounded_once = stack.enter_context(_joined(inner, None))
        rest = [layer for layer in layers if layer not in rounded_once]
        fused = {layer: partial(_forward, layer, _pair(layer)) for layer in rest}
        stack.enter_context(replaced_forwards(fused))
        yield


@contextmanager
def rounded_once(model: PreTrainedModel, compute: str) -> Iterator[None]:
    """Round the sum of a base's and its LoRA adapter's output once within the context, in which the
    adapters are trained with products in the type `compute`. Nothing changes where both this and
    the weights are float32, and layers with DoRA keep PEFT's rounding."""
    kind = getattr(torch, compute)
    with _joined(trained_layers(model), kind if kind in _HALF else None):
        yield


def trained_layers(model: nn.Module) -> list[Any]:
    """The linear layers of a model whose LoRA adapters `rounded_once` handles."""
    return [layer for layer in model.modules() if _is_plain(layer, training=True)]


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Give modules another `forward` within the context."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            cast(Any, module).forward = forward
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                vars(module).pop("forward", None)
            else:
                cast(Any, module).forward = earlier


_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
"""Names of PEFT's classes for LoRA on a linear layer."""


def _is_plain(layer: Any, *, training: bool = False) -> bool:
    if type(layer).__name__ not in _KINDS or not hasattr(layer, "lora_A"):
        return False
    if layer.disable_adapters or layer.merged:
        return False
    names = _active(layer)
    parts = [layer.lora_A[name] for name in names] + [layer.lora_B[name] for name in names]
    linear = all(type(part) is nn.Linear and part.bias is None for part in parts)
    dropout = (layer.lora_dropout[name] for name in names)
    drops = any(part.training for part in dropout if isinstance(part, nn.Dropout)) and not training
    return bool(names) and linear and not drops and not set(names) & set(layer.lora_variant)


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    """A [rank, input] and the scaled B [output, rank] of all active adapters together."""
    names = _active(layer)
    a = torch.cat([layer.lora_A[name].weight.detach() for name in names])
    b = [layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names]
    return a, torch.cat(b, 1)


def _forward(
    layer: Any, pair: tuple[Tensor, Tensor], x: Tensor, *rest: Any, **named: Any
) -> Tensor:
    """base(x) + x A^T B^T: [..., input] to [..., output]."""
    out: Tensor = layer.base_layer(x, *rest, **named)
    if layer.disable_adapters:
        return out
    a, b = pair
    low_rank = x.to(a.device, a.dtype).reshape(-1, x.shape[-1]) @ a.T
    if out.dtype != a.dtype:
        return (out + (low_rank @ b.T).view(out.shape)).to(out.dtype)
    out.view(-1, out.shape[-1]).addmm_(low_rank, b.T)
    return out


# ------------------------------------------------------------------------------------ one rounding


@contextmanager
def _joined(layers: list[Any], kind: torch.dtype | None) -> Iterator[dict[nn.Module, Any]]:
    """Join those of the layers whose products are in 16 bits, in this type or that of their
    weights."""
    joined = {layer: one for layer in layers if (one := join([layer], kind)) is not None}
    forwards = {layer: partial(_sum, layer, one) for layer, one in joined.items()}
    try:
        with replaced_forwards(forwards):
            yield joined
    finally:
        for one in joined.values():
            one.close()


def join(layers: Sequence[Any], kind: torch.dtype | None) -> Joined | None:
    """What makes the products of layers with one base; None where each has its own."""
    layer, base = layers[0], layers[0].base_layer
    rank = sum(each.lora_A[name].out_features for each in layers for name in _active(each))
    if type(layer).__name__ == "Linear4bit":
        kind = kind or base.compute_dtype
        return _NF4(base, kind) if kind in _HALF else None
    if type(layer).__name__ == "Linear8bitLt":
        return _Int8(base)
    kind = kind or base.weight.dtype
    return _Float(base, rank, kind) if type(base) is nn.Linear and kind in _HALF else None


class _Float:
    """[W, s B] of a layer with weights in floats. The layer's own weights become a part of it, so
    that there is no second copy if they have this type."""

    def __init__(self, base: nn.Linear, rank: int, kind: torch.dtype) -> None:
        self.base, self.kind, self.size = base, kind, base.in_features
        weight = base.weight.detach()
        self.all = weight.new_empty(base.out_features, self.size + rank, dtype=kind)
        self.all[:, : self.size] = weight
        self.shared = weight.dtype == kind
        if self.shared:
            base.weight.data = self.all[:, : self.size]

    def with_b(self, b: Tensor) -> Tensor:
        self.all[:, self.size : (end := self.size + b.shape[1])] = b.detach()
        return self.all[:, :end]

    def weight(self) -> Tensor:
        return self.all[:, : self.size]

    def close(self) -> None:
        if self.shared:
            self.base.weight.data = self.base.weight.data.contiguous()
        del self.all  # before the next layer's copy


class _NF4:
    """[W, s B] of a layer with weights in 4 bits, unpacked for every product."""

    def __init__(self, base: Any, kind: torch.dtype) -> None:
        self.base, self.kind = base, kind

    def with_b(self, b: Tensor) -> Tensor:
        return torch.cat([self.weight(), b.detach().to(self.kind)], 1)

    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = self.base.weight
        return cast(Tensor, dequantize_4bit(weight.data, weight.quant_state)).to(self.kind)

    def close(self) -> None:
        pass


class _Int8:
    """A layer with weights in 8 bits, whose kernel also yields float32."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def close(self) -> None:
        pass


Joined = _Float | _NF4 | _Int8


def _sum(layer: Any, joined: Joined, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """base(x) + x A^T (s B)^T, rounded once: [..., input] to [..., output]."""
    if layer.disable_adapters or layer.merged:
        return cast(Tensor, type(layer).forward(layer, x, *rest, **named))
    x = x.to(joined.base.weight.device)  # as the replaced `forward` does for a head on another GPU
    return joined_sum(layer, joined, x, [low_rank(layer, x)])


def low_rank(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x A^T [..., rank] and s B [output, rank] of the active adapters of a layer."""
    names = _active(layer)
    b = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1)
    parts = [layer.lora_A[name](layer.lora_dropout[name](x.to(b.dtype))) for name in names]
    return torch.cat(parts, -1), b


def joined_sum(
    layer: Any, joined: Joined | None, x: Tensor, parts: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """base(x) plus h b^T for each (h [..., rank], b [output, rank]) of the `parts`, to which the
    tokens of x belong in this order; with one base product, and one rounding unless there is
    nothing joined."""
    if isinstance(joined, _Float | _NF4):
        flat = x.flatten(0, -2).to(joined.kind)
        hs = [h.flatten(0, -2).to(joined.kind) for h, _ in parts]
        out: Tensor = cast(Any, _Product).apply(flat, joined, *hs, *(b for _, b in parts))
        out = out.view(*x.shape[:-1], -1)
        return out.to(x.dtype) if isinstance(joined, _NF4) else out
    if joined is None:
        added = [h.flatten(0, -2) @ b.T for h, b in parts]
        whole: Tensor = layer.base_layer(x)
        return whole + torch.cat(added).view(whole.shape).to(whole.dtype)
    with torch.autocast(x.device.type, enabled=False):
        added = [h.flatten(0, -2).float() @ b.T for h, b in parts]
        whole = layer.base_layer(x.float())
        whole = whole + torch.cat(added).view(whole.shape)
    # The kernel keeps which inputs were outliers, in a small tensor between large ones that are
    # freed, so the heap would grow by a layer's products with every layer.
    layer.base_layer.state.idx = None
    return whole.to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T + h b^T + bias as one product, for frozen W [output, input] and one or more pairs of h
    [token, rank] and b [output, rank], each for the next tokens of x [token, input]. What is not
    finite in one pair stays with its tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: _Float | _NF4, *pairs: Tensor) -> Tensor:
        ctx.joined = joined
        ctx.save_for_backward(*pairs)
        bias = joined.base.bias
        bias = bias if bias is None else bias.to(joined.kind)
        hs, bs = pairs[: len(pairs) // 2], list(pairs[len(pairs) // 2 :])
        h, b = hs[0], bs[0]
        if len(hs) > 1:  # the products of a pair's b and the zeros of other tokens must be zeros
            h = cast(Any, torch).block_diag(*(h + 0 * b.sum() for h, b in zip(hs, bs, strict=True)))
            b = torch.cat(bs, 1).nan_to_num(0.0, 0.0, 0.0)
        return nn.functional.linear(torch.cat([x, h.to(x.dtype)], -1), joined.with_b(b), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pairs = ctx.saved_tensors
        hs, bs = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        grad = grad.to(hs[0].dtype)
        x_grad = grad @ ctx.joined.weight() if ctx.needs_input_grad[0] else None
        own = torch.split(grad, [len(h) for h in hs])
        h_grads = [part @ b.to(part.dtype) for part, b in zip(own, bs, strict=True)]
        b_grads = [(part.T @ h).to(b.dtype) for part, h, b in zip(own, hs, bs, strict=True)]
        return x_grad, None, *h_grads, *b_grads
