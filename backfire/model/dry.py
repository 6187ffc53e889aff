"""Passes through a model without its data, to count the memory that they need.

Every tensor has a shape and a type and no values (torch's fake tensors), so a 7B model takes no
memory and a pass a fraction of a second. What is counted is what the modules of this architecture
and method really allocate, and when they release it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from backfire.errors import UserError
from backfire.model.types import Type

_DEPTHS = (1, 2)
"""Layers of the models that are run; memory grows by the same amount with every further layer."""


@dataclass(frozen=True)
class Tokens:
    """The size of a pass: rows, tokens of each, and how many of them reach the head."""

    rows: int
    length: int
    answer: int


@dataclass(frozen=True)
class PassTypes:
    """The types of a pass."""

    compute: Type
    """Of the matrix products."""
    matrices: Type
    """Of the frozen matrices of linear layers except the head."""
    rest: Type
    """Of the other frozen weights."""
    trained: Type = "float32"


class DryRun:
    """A model with its method attached, on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.depth = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        self.stack = _layers(model, self.depth)

    def training(
        self, size: Tokens, types: PassTypes, *, exact: bool = False, recompute: bool = False
    ) -> float:
        """Most bytes that a forward and a backward pass hold at once besides the weights and their
        gradients. `exact`: attention is in float32 (see `train.precision`).

        Raises:
            UserError: this model cannot be run without data.
        """

        def look(model: PreTrainedModel) -> list[int]:
            model.train()
            if recompute:
                from backfire.train.microbatch import recompute_layers

                recompute_layers(model)
            for p in model.parameters():  # gradients are counted elsewhere
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_drop_gradient)
            return _peaks(model, size, types.compute, backward=True)

        return self._at_full_depth(look, types, exact=exact)

    def evaluation(self, size: Tokens, dtype: Type) -> float:
        """Most bytes that a pass without gradients holds at once besides the weights, and the cache
        of keys and values after it.

        Raises:
            UserError: this model cannot be run without data.
        """

        def look(model: PreTrainedModel) -> list[int]:
            return _peaks(model.eval(), size, "float32", backward=False)

        types = PassTypes("float32", dtype, dtype)
        return self._at_full_depth(look, types) + self._cache(size, dtype)

    def _cache(self, size: Tokens, dtype: Type) -> float:
        config = self.model.config.get_text_config(decoder=True)
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        each = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        width = 2 * groups * each * getattr(torch, dtype).itemsize
        return float(size.rows * size.length * self.depth * width)

    def _at_full_depth(
        self, look: Callable[[PreTrainedModel], list[int]], types: PassTypes, exact: bool = False
    ) -> float:
        try:
            found = {}
            for depth in _DEPTHS if self.stack else (self.depth,):
                with self._shortened(depth) as model, _without_data(model, types):
                    _prepare(model, types.compute, exact=exact)
                    found[depth] = look(model)
        except UserError:
            raise
        except Exception as error:  # an operation whose shapes depend on values, as in some MoE
            kind = self.model.config.model_type
            raise UserError(f"Models of type '{kind}' cannot be run without data.") from error
        first, second = found[min(found)], found[max(found)]
        more = self.depth - min(found)
        # The pass back through the lower layers only releases memory, until the embedding.
        upper = [one + more * (two - one) for one, two in zip(first[:2], second[:2], strict=True)]
        return max(*upper, second[2])

    @contextlib.contextmanager
    def _shortened(self, depth: int) -> Iterator[PreTrainedModel]:
        """The model with its last `depth` layers only."""
        config = self.model.config.get_text_config(decoder=True)
        layers = list(self.stack or ())
        try:
            if self.stack:
                _replace(self.stack, layers[-depth:])
                config.num_hidden_layers = depth
            yield self.model
        finally:
            if self.stack:
                _replace(self.stack, layers)
                config.num_hidden_layers = self.depth


def _layers(model: PreTrainedModel, depth: int) -> nn.ModuleList | None:
    """The list of the model's layers; None if there is not exactly one of this length."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


def _replace(stack: nn.ModuleList, layers: list[nn.Module]) -> None:
    stack._modules.clear()
    stack.extend(layers)


@contextlib.contextmanager
def _without_data(model: PreTrainedModel, types: PassTypes) -> Iterator[None]:
    """Within the context every weight is a tensor of its shape, in these types, without data."""
    head, new = model.get_output_embeddings(), dict[int, Tensor]()
    old: list[tuple[dict[str, Any], str, Tensor]] = []

    def empty(tensor: Tensor, kind: Type) -> Tensor:
        if id(tensor) not in new:  # tied weights stay tied
            dtype = getattr(torch, kind) if tensor.is_floating_point() else tensor.dtype
            new[id(tensor)] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                trained = tensor.requires_grad
                new[id(tensor)] = nn.Parameter(new[id(tensor)], requires_grad=trained)
        return new[id(tensor)]

    with FakeTensorMode():
        try:
            for module in model.modules():
                is_matrix = isinstance(module, nn.Linear) and module is not head
                frozen = types.matrices if is_matrix else types.rest
                for place in (module._parameters, module._buffers):
                    for name, tensor in list(cast(dict[str, Tensor | None], place).items()):
                        if tensor is not None:
                            kind = types.trained if tensor.requires_grad else frozen
                            kind = "float32" if place is module._buffers else kind
                            old.append((cast(Any, place), name, tensor))
                            cast(Any, place)[name] = empty(tensor, kind)
            yield
        finally:
            for place, name, tensor in old:
                place[name] = tensor


def _prepare(model: PreTrainedModel, compute: Type, *, exact: bool) -> None:
    """Set the model up as in training; see `train.finetune`."""
    from backfire.train.precision import disable_adapter_casts, exact_attention

    if exact:
        exact_attention(model)
    elif hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    if compute != "float32":
        disable_adapter_casts(model)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _peaks(model: PreTrainedModel, size: Tokens, compute: Type, *, backward: bool) -> list[int]:
    """Most bytes held at once by a pass with the loss of its answers: until the gradient reaches
    the last layer, until it leaves it, and after."""
    from backfire.train.batches import token_losses

    head, held = model.get_output_embeddings(), _Held(model)

    def choose(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.mark_at_gradient_of(args[0])
        return (args[0][:, -size.answer :], *args[1:])

    def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        held.mark_at_gradient_of(args[0])

    stack = _layers(model, model.config.get_text_config(decoder=True).num_hidden_layers)
    hooks = [head.register_forward_pre_hook(choose, prepend=True)] if head is not None else []
    hooks += [stack[-1].register_forward_pre_hook(enter)] if stack else []
    try:
        with held, torch.set_grad_enabled(backward):
            ids = torch.zeros(size.rows, size.length, dtype=torch.long)
            labels = torch.zeros(size.rows, size.answer, dtype=torch.long)
            kind = getattr(torch, compute)
            with torch.autocast("cpu", kind, enabled=kind.itemsize == 2):
                out = cast(Any, model)(input_ids=ids, use_cache=False)
                loss = token_losses(out.logits[:, -size.answer :], labels).sum()
            if backward:
                del out
                torch.autograd.backward(loss)
        return [*held.most, 0, 0][:3]
    finally:
        for hook in hooks:
            hook.remove()


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that exist at once, without those of the model's weights;
    `most` has an entry for each part of the pass, which marks divide."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most, self.marks = 0, [0], list[Any]()
        tensors = [*model.parameters(), *model.buffers()]
        self.sizes = {t.untyped_storage()._cdata: 0 for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def mark_at_gradient_of(self, tensor: Tensor) -> None:
        """Begin another part when this tensor's gradient is known."""
        if tensor.requires_grad and len(self.marks) < 2:  # recomputed layers run again
            self.marks.append(cast(Any, tensor).register_hook(self._mark))

    def _mark(self, gradient: Tensor) -> None:
        self.most.append(self.now)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most[-1] = max(self.most[-1], self.now)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
