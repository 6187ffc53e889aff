"""Passes through a model without its data, to count the memory that they need.

Every tensor has a shape and a type and no values (torch's fake tensors), so a 7B model takes no
memory and a pass a fraction of a second. What is counted is what the modules of this architecture
and method really allocate, and when they release it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from backfire.errors import UserError
from backfire.model.batching import plain, presume
from backfire.model.fused import rounded_once
from backfire.model.types import Type

_DEPTHS = (1, 2)
"""Layers of the models that are run; memory grows by the same amount with every further layer."""


@dataclass(frozen=True)
class Layout:
    """The rows of a pass."""

    rows: tuple[tuple[int, int], ...]
    """Tokens of each row, and of its answer."""
    shared: int = 0
    """Tokens at the start that all rows share and that run once."""
    packed: bool = False
    """Whether the rows are packed end to end, not padded."""
    flat: bool = False
    """Whether a pack has logits without padding too."""

    @property
    def answers(self) -> int:
        """Positions whose logits are computed."""
        every = [answer for _, answer in self.rows]
        return sum(every) if self.packed and self.flat else len(every) * max(every)

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        own = [whole - self.shared for whole, _ in self.rows]
        return self.shared + (sum(own) if self.packed else len(own) * max(own))


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


Look = Callable[[PreTrainedModel, FakeTensorMode], list[int]]
"""Most bytes that a pass holds, in each of its parts."""


class DryRun:
    """A model with its method attached, on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.depth = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        self.stack = _layers(model)

    def training(
        self, layout: Layout, types: PassTypes, *, exact: bool = False, recompute: bool = False
    ) -> float:
        """Most bytes that a forward and a backward pass hold at once besides the weights and their
        gradients. `exact`: attention is in float32 (see `train.precision`).

        Raises:
            UserError: this model cannot be run without data.
        """

        def look(model: PreTrainedModel, mode: FakeTensorMode) -> list[int]:
            model.train()
            for p in model.parameters():  # gradients are counted elsewhere
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_drop_gradient)
            # Matrices joined with their adapters are counted, unless they are the weights.
            with rounded_once(model, types.compute):
                return _peaks(model, mode, layout, types.compute, backward=True)

        return self._at_full_depth(look, types, exact=exact, recompute=recompute)

    def evaluation(self, layout: Layout, dtype: Type) -> float:
        """Most bytes that a pass without gradients holds at once besides the weights; logits are
        in float32.

        Raises:
            UserError: this model cannot be run without data.
        """
        from backfire.model.head import for_evaluation

        def look(model: PreTrainedModel, mode: FakeTensorMode) -> list[int]:
            with torch.no_grad(), for_evaluation(model.eval()):
                return _peaks(model, mode, layout, "float32", backward=False)

        # In float16 the head reads its inputs, which have no values here.
        dtype = "bfloat16" if dtype == "float16" else dtype
        return self._at_full_depth(look, PassTypes("float32", dtype, dtype))

    def cached(self, dtype: Type) -> int:
        """Bytes of the keys and values of a token."""
        config = self.model.config.get_text_config(decoder=True)
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        each = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 2 * groups * each * self.depth * int(getattr(torch, dtype).itemsize)

    def _at_full_depth(
        self, look: Look, types: PassTypes, *, exact: bool = False, recompute: bool = False
    ) -> float:
        try:
            found = {}
            for depth in _DEPTHS if self.stack else (self.depth,):
                with self._shortened(depth) as model, _without_data(model, types) as mode:
                    _prepare(model, types.compute, exact=exact)
                    with _recomputing(model) if recompute else contextlib.nullcontext():
                        found[depth] = look(model, mode)
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


def _layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list of the model's layers; None if there is not exactly one list of as many modules."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


def _replace(stack: nn.ModuleList, layers: list[nn.Module]) -> None:
    stack._modules.clear()
    stack.extend(layers)


@contextlib.contextmanager
def _without_data(model: PreTrainedModel, types: PassTypes) -> Iterator[FakeTensorMode]:
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

    with FakeTensorMode() as mode:
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
            yield mode
        finally:
            for place, name, tensor in old:
                place[name] = tensor


def _prepare(model: PreTrainedModel, compute: Type, *, exact: bool) -> None:
    """Set the model up as in training; see `train.finetune`."""
    from backfire.train.packing import reads_tables
    from backfire.train.precision import disable_adapter_casts, exact_attention

    presume(model)
    model.set_attn_implementation("sdpa")
    if exact:
        exact_attention(model)
    reads_tables(plain(model))
    if compute != "float32":
        disable_adapter_casts(model)


@contextlib.contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    from backfire.train.microbatch import recompute_layers

    recompute_layers(model)
    try:
        yield
    finally:
        cast(Any, model).activation_checkpointing_disable()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _batch(layout: Layout, mode: FakeTensorMode) -> Any:
    """A batch of these rows without data."""
    from backfire.train.batches import Span, collate_spans

    with unset_fake_temporarily():
        spans = [
            Span([*[0] * layout.shared, *[number] * (whole - layout.shared)], whole - answer, whole)
            for number, (whole, answer) in enumerate(layout.rows)
        ]
        share, pack, flat = layout.shared > 0, layout.packed, layout.flat
        batch = collate_spans(spans, share=share, pack=pack, flat=flat)
        parts = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    tensors = {name: x for name, x in parts.items() if isinstance(x, torch.Tensor)}
    made: dict[str, Any] = {name: mode.from_tensor(x) for name, x in tensors.items()}
    return replace(batch, **made)


def _peaks(
    model: PreTrainedModel, mode: FakeTensorMode, layout: Layout, compute: Type, *, backward: bool
) -> list[int]:
    """Most bytes held at once by a pass with the loss of its answers: until the gradient reaches
    the last layer, until it leaves it, and after."""
    from backfire.train.batches import answer_logits, token_losses

    batch, held, hooks = _batch(layout, mode), Held(model), list[Any]()
    head, stack = model.get_output_embeddings(), _layers(model)
    for part, module in enumerate((head, stack[-1] if stack else None)):
        if module is not None:
            mark = partial(held.mark, part)
            hooks.append(module.register_forward_pre_hook(lambda m, args, mark=mark: mark(args[0])))
    try:
        with held, torch.set_grad_enabled(backward):
            kind = getattr(torch, compute)
            with torch.autocast("cpu", kind, enabled=kind.itemsize == 2):
                logits = answer_logits(model, batch)
                loss = token_losses(logits, batch.labels).sum()
            if backward:
                del logits
                torch.autograd.backward(loss)
        return [*held.most, 0, 0][:3]
    finally:
        for hook in hooks:
            hook.remove()


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that exist at once, without those of the model's weights;
    `most` has an entry for each part of the pass, which marks divide."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most, self.begun = 0, [0], set[int]()
        tensors = [*model.parameters(), *model.buffers()]
        self.sizes = {t.untyped_storage()._cdata: 0 for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def mark(self, part: int, tensor: Tensor) -> None:
        """Begin another part when the gradient of this tensor is known, once for each part."""

        def begin(gradient: Tensor) -> None:
            if part not in self.begun:
                self.begun.add(part)
                self.most.append(self.now)

        if tensor.requires_grad:
            cast(Any, tensor).register_hook(begin)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most[-1] = max(self.most[-1], self.now)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
