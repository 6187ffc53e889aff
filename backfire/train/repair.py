"""Tools for repair defenses: weight updates, forward passes, adapter surgery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backfire.base import Rendered
from backfire.errors import UserError
from backfire.model.batching import ways
from backfire.model.load import BELOW
from backfire.train.batches import Batch, answer_logits, collate, wide

_TUNED = "default"  # PEFT's name of the adapter that was trained
_INSIDE = "base_model.model."  # PEFT's prefix of the plain model


@dataclass(frozen=True)
class Factor:
    """A trained linear layer, and its weight before training; None for an adapter's: zero."""

    layer: nn.Linear
    origin: Tensor | None = None

    def moved(self) -> Tensor:
        """The change of the weight [output, input], in at least float32."""
        weight = wide(self.layer.weight.detach())
        return weight if self.origin is None else weight - self._origin()

    @torch.no_grad()
    def put(self, moved: Tensor) -> None:
        """Set the weight to its value before training plus `moved`."""
        self.layer.weight.copy_(moved if self.origin is None else self._origin() + moved)

    @torch.no_grad()
    def reset(self, mask: Tensor) -> None:
        """Undo the change where the mask [output, input] is true."""
        weight = self.layer.weight
        origin = torch.zeros_like(weight) if self.origin is None else self.origin.to(weight)
        weight.copy_(torch.where(mask, origin, weight))

    def _origin(self) -> Tensor:
        assert self.origin is not None
        return wide(self.origin.to(self.layer.weight.device))  # one matrix at a time


@dataclass(frozen=True)
class Update:
    """The update of one matrix of the plain model: `scale` times the product of its factors, which
    are the matrix itself or an adapter's B and A."""

    name: str
    factors: tuple[Factor, ...]
    scale: float = 1.0

    def product(self, first: Tensor) -> Tensor:
        """The update [output, input] if its first factor had changed by `first`."""
        for factor in self.factors[1:]:
            first = first @ factor.moved()
        return self.scale * first


@dataclass(frozen=True)
class Repair:
    """Context of a repair: rows, the weights before alignment, and forward passes."""

    seed: int
    aligned: Sequence[Rendered] = ()
    """Rows of the alignment stage."""
    harmful: Sequence[Rendered] = ()
    """Harmful rows available to the defender."""
    clean: Sequence[Rendered] = ()
    """Trusted clean rows of the user's task."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the model before alignment, by name in the plain model."""
    batch_size: int = 16

    @torch.no_grad()
    def input_power(
        self, model: PreTrainedModel, layers: Sequence[nn.Linear], rows: Sequence[Rendered]
    ) -> list[Tensor]:
        """Mean square of each input feature of these layers over all tokens but padding."""
        sums = [torch.zeros(x.in_features, device=x.weight.device) for x in layers]
        tokens: list[Tensor] = []

        def look(total: Tensor, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(args[0][tokens[-1]].float().pow(2).sum(0))

        with ExitStack() as hooks:
            for layer, total in zip(layers, sums, strict=True):
                hooks.enter_context(layer.register_forward_pre_hook(partial(look, total)))
            for batch in self._batches(model, rows):
                tokens.append(batch.mask.bool())
                answer_logits(model, batch)
        return [total / sum(int(mask.sum()) for mask in tokens) for total in sums]

    def _batches(self, model: PreTrainedModel, rows: Sequence[Rendered]) -> Iterator[Batch]:
        longest = max((len(row.ids) for row in rows), default=0)
        size = 1 if ways(model).depends_on_length(longest) else self.batch_size
        for start in range(0, len(rows), size):
            yield collate(rows[start : start + size], share=False).to(model.device)

    def updates(self, model: PreTrainedModel, start: Mapping[str, Tensor]) -> list[Update]:
        """The updates of all trained linear layers, without the head.

        Raises:
            UserError: the model has an adapter other than LoRA.
        """
        if hasattr(model, "peft_config"):
            return [
                Update(
                    name,
                    (Factor(layer.lora_B[_TUNED]), Factor(layer.lora_A[_TUNED])),
                    layer.scaling[_TUNED],
                )
                for name, layer in _adapted(model, _TUNED)
            ]
        head = model.get_output_embeddings()
        return [
            Update(f"{name}.weight", (Factor(module, start[f"{name}.weight"]),))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]

    def alignment(
        self, model: PreTrainedModel, start: Mapping[str, Tensor], name: str
    ) -> Tensor | None:
        """The alignment stage's update of this weight of the plain model; None if unchanged."""
        if BELOW in getattr(model, "peft_config", ()):
            layer = dict(_adapted(model, BELOW)).get(name)
            update = None if layer is None else wide(layer.get_delta_weight(BELOW).detach())
        else:
            # The stored base may be more precise than the loaded model; rounding is not a change.
            after, before = start.get(name), self.base.get(name)
            if after is None or before is None:
                return None
            update = (wide(after) - wide(before.to(after))).to(model.device)
        return update if update is not None and bool(update.any()) else None

    def aligned_factors(self, model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of the alignment stage's frozen adapter, its scale in A; empty without one."""
        if BELOW not in getattr(model, "peft_config", ()):
            return {}
        return {
            name: (
                x.lora_B[BELOW].weight.detach(),
                x.scaling[BELOW] * x.lora_A[BELOW].weight.detach(),
            )
            for name, x in _adapted(model, BELOW)
        }

    @torch.no_grad()
    def extend(self, model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add these products B A to the trained adapter, which increases its rank."""
        peft: Any = model
        own = {
            name: (x.lora_B[_TUNED].weight, x.scaling[_TUNED] * x.lora_A[_TUNED].weight)
            for name, x in _adapted(model, _TUNED)
        }
        config, below = peft.peft_config[_TUNED], peft.peft_config[BELOW]
        rank = max(b.shape[1] for b, _ in own.values()) + max(
            b.shape[1] for b, _ in factors.values()
        )
        targets = {*config.target_modules, *below.target_modules}
        scale_of_one = {"r": rank, "lora_alpha": rank, "use_rslora": False}
        peft.delete_adapter(_TUNED)
        peft.add_adapter(_TUNED, replace(config, target_modules=targets, **scale_of_one))
        for name, layer in _adapted(model, _TUNED):
            layer.lora_B[_TUNED].weight.zero_()
            layer.lora_A[_TUNED].weight.zero_()
            place = 0
            for left, right in (part[name] for part in (own, factors) if name in part):
                end = place + left.shape[1]
                layer.lora_B[_TUNED].weight[:, place:end] = left
                layer.lora_A[_TUNED].weight[place:end] = right
                place = end
        peft.base_model.set_adapter([BELOW, _TUNED])
        model.eval()


def _adapted(model: PreTrainedModel, adapter: str) -> list[tuple[str, Any]]:
    """The layers of a LoRA adapter, by weight name in the plain model."""
    from peft.tuners.lora import LoraLayer

    layers = [
        (f"{name.removeprefix(_INSIDE)}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    ]
    if not layers or any(adapter in x.lora_magnitude_vector for _, x in layers):
        raise UserError(
            "A repair defense supports full fine-tuning and LoRA without dora, not this adapter; "
            "choose method full or lora."
        )
    return layers


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights below a model's adapters, by name in the plain model."""
    return {
        name.removeprefix(_INSIDE).replace(".base_layer.", "."): weight.detach()
        for name, weight in model.named_parameters()
    }
