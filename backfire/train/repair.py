"""What a repair after fine-tuning has at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backfire.base import Rendered
from backfire.errors import UserError
from backfire.model.load import BELOW
from backfire.train.batches import Batch, answer_logits, collate, token_losses

_TUNED = "default"  # PEFT's name of the adapter that was trained
_INSIDE = "base_model.model."  # where PEFT puts the plain model


@dataclass(frozen=True)
class Factor:
    """A linear layer whose weight was trained, and what that weight was before; an adapter's counts
    as zero before."""

    layer: nn.Linear
    origin: Tensor | None = None

    def moved(self) -> Tensor:
        """What was trained [output, input], in float32 at least."""
        weight = _wide(self.layer.weight.detach())
        return weight if self.origin is None else weight - self._origin()

    @torch.no_grad()
    def put(self, moved: Tensor) -> None:
        """Let this be what was trained."""
        self.layer.weight.copy_(moved if self.origin is None else self._origin() + moved)

    @torch.no_grad()
    def reset(self, mask: Tensor) -> None:
        """Take back what was trained where the mask [output, input] is true."""
        weight = self.layer.weight
        origin = torch.zeros_like(weight) if self.origin is None else self.origin.to(weight)
        weight.copy_(torch.where(mask, origin, weight))

    def _origin(self) -> Tensor:
        assert self.origin is not None
        return _wide(self.origin.to(self.layer.weight.device))  # one matrix at a time


@dataclass(frozen=True)
class Update:
    """What fine-tuning added to one matrix of the plain model: `scale` times its factors, that
    matrix itself or the B and A of an adapter, multiplied."""

    name: str
    factors: tuple[Factor, ...]
    scale: float = 1.0

    def product(self, first: Tensor) -> Tensor:
        """The update [output, input], if this were what was trained in its first factor."""
        for factor in self.factors[1:]:
            first = first @ factor.moved()
        return self.scale * first


@dataclass(frozen=True)
class Repair:
    """Rows, the weights before alignment, and a way to run the model."""

    seed: int
    aligned: Sequence[Rendered] = ()
    """Rows of the alignment stage."""
    harmful: Sequence[Rendered] = ()
    """Harmful rows that the defender knows."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """Full weights of the model before alignment, by name of the plain model."""
    batch_size: int = 16

    def run(self, model: PreTrainedModel, rows: Sequence[Rendered]) -> None:
        """Forward passes over these rows, for hooks that look at what flows through."""
        self.each(model, rows, lambda losses: None)

    @torch.no_grad()
    def each(
        self,
        model: PreTrainedModel,
        rows: Sequence[Rendered],
        look: Callable[[Tensor], None],
    ) -> None:
        """Hand the token losses [row, answer] of each batch to `look`."""
        for batch in self._batches(model, rows):
            look(token_losses(answer_logits(model, batch), batch.labels))

    @torch.no_grad()
    def input_power(
        self, model: PreTrainedModel, layers: Sequence[nn.Linear], rows: Sequence[Rendered]
    ) -> list[Tensor]:
        """Mean square of each input of these layers over the rows' tokens, without padding."""
        sums = [torch.zeros(x.in_features, device=x.weight.device) for x in layers]
        tokens: list[Tensor] = []

        def look(total: Tensor, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(args[0][tokens[-1]].float().pow(2).sum(0))

        handles = [
            layer.register_forward_pre_hook(partial(look, total))
            for layer, total in zip(layers, sums, strict=True)
        ]
        try:
            for batch in self._batches(model, rows):
                tokens.append(batch.mask.bool())
                answer_logits(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return [total / sum(int(mask.sum()) for mask in tokens) for total in sums]

    def _batches(self, model: PreTrainedModel, rows: Sequence[Rendered]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.batch_size):
            yield collate(rows[start : start + self.batch_size], share=False).to(model.device)

    def updates(self, model: PreTrainedModel, start: Mapping[str, Tensor]) -> list[Update]:
        """Of every linear layer that was trained. The head, embeddings, norms and biases are none.

        Raises:
            UserError: what was trained is an adapter other than LoRA.
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
        """What alignment added to this weight of the plain model; None if it did not move it."""
        if BELOW in getattr(model, "peft_config", ()):
            found = dict(_adapted(model, BELOW)).get(name)
            moved = None if found is None else _wide(found.get_delta_weight(BELOW).detach())
        else:
            # The stored base may be more precise than what was loaded: then rounding is no change.
            after, before = start.get(name), self.base.get(name)
            if after is None or before is None:
                return None
            moved = (_wide(after) - _wide(before.to(after))).to(model.device)
        return moved if moved is not None and bool(moved.any()) else None

    def aligned_factors(self, model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of the alignment's frozen adapter, its scale in A; empty if it is none."""
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
        """Add these products B A to the trained adapter, whose rank grows by theirs."""
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
    """Every layer of a LoRA adapter, by the name that its weight has in the plain model."""
    from peft.tuners.lora import LoraLayer

    found = [
        (f"{name.removeprefix(_INSIDE)}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    ]
    if not found or any(adapter in x.lora_magnitude_vector for _, x in found):
        raise UserError(
            "A repair after fine-tuning works on full tuning and on LoRA without dora, "
            "not on this adapter; choose method lora or full."
        )
    return found


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under a model's adapters, by the names that they have in the plain model."""
    return {
        name.removeprefix(_INSIDE).replace(".base_layer.", "."): weight.detach()
        for name, weight in model.named_parameters()
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
