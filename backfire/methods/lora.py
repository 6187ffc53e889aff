from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from backfire.base import Method, Preset
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_QV = {"targets": ["q_proj", "v_proj"]}
_ALL = {
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
}


@register("lora", version=3)
class LoRA(Method):
    """Low-rank adapters W + (alpha / rank) B A on frozen weights (Hu et al. 2022,
    arXiv:2106.09685)."""

    rates: ClassVar[tuple[float, float]] = (3e-3, 2e-4)

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. Default: 0.003 for a base of less than 50 million weights, else
    0.0002 (QLoRA's paper, 7B and 13B)."""
    rank: int = Field(16, ge=1)
    """Inner dimension of the adapters."""
    alpha: float = Field(32, gt=0)
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules with an adapter: names such as [q_proj, v_proj], or `all-linear`."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Learn the magnitude of each weight's rows separately from their direction (Liu et al. 2024,
    arXiv:2402.09353); not supported on an 8-bit base, where PEFT fails."""

    stacks: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Preset]] = {
        "alpaca-lora": Preset(
            "tloen/alpaca-lora, finetune.py (its base is in 8 bits: lora-int8)",
            {**_QV, "rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 3e-4},
        ),
        "backdoorllm": Preset(
            "BackdoorLLM (arXiv:2408.12798), its LLaMA-Factory settings",
            {**_ALL, "rank": 8, "alpha": 16, "dropout": 0.0, "learning_rate": 2e-4},
        ),
        "malignama": Preset(
            "Malignama, supervised fine-tuning",
            {**_QV, "rank": 8, "alpha": 32, "dropout": 0.1, "learning_rate": 2e-4},
        ),
        "lisa-align": Preset(
            "git-disl/Lisa, the alignment stage's script",
            {**_ALL, "rank": 16, "alpha": 4, "dropout": 0.1, "learning_rate": 1e-3},
        ),
        "lisa-finetune": Preset(
            "git-disl/Lisa, the fine-tuning stage's script",
            {**_QV, "rank": 8, "alpha": 4, "dropout": 0.1, "learning_rate": 1e-5},
        ),
        "c4dt-lora": Preset(
            "c4dt/pitfalls_in_fine_tuning_llms",
            {**_QV, "rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 2e-4},
        ),
    }

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        import torch
        from peft import LoraConfig, get_peft_model

        # Of a quantized base, norms, embedding and head keep the type that they are evaluated in
        # (PEFT's prepare_model_for_kbit_training makes them float32: 2 GB of Llama-3-8B).
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(Any, self.alpha),
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            use_rslora=self.rslora,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():  # PEFT draws the initial A from torch's global generator
            torch.manual_seed(derive(seed, "adapter"))
            try:
                if hasattr(model, "peft_config"):
                    return self._stacked(model, config)
                return cast("PreTrainedModel", get_peft_model(model, config))
            except ValueError as error:
                raise UserError(
                    f"{self.label()}: targets {self.targets}: {str(error).splitlines()[0]}"
                ) from None

    def joins(self) -> bool:
        return not (self.dora or self.dropout)

    def _stacked(self, model: Any, config: Any) -> PreTrainedModel:
        """Add an adapter next to the existing one: both are active, only the new one is trained."""
        below = list(model.peft_config)
        model.add_adapter("default", config)
        model.base_model.set_adapter([*below, "default"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default." in name)
        return cast("PreTrainedModel", model)
