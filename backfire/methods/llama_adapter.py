from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from backfire.base import Method, Preset
from backfire.errors import UserError
from backfire.registry import register
from backfire.rng import derive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("llama-adapter", version=3)
class LlamaAdapter(Method):
    """Learns prompts in the attention of the upper layers, each with a gate that starts at zero
    (Zhang et al. 2023, arXiv:2303.16199; PEFT's AdaptionPrompt, one gate per layer)."""

    merges: ClassVar[bool] = False
    rates: ClassVar[tuple[float, float]] = (5e-2, 9e-3)

    learning_rate: float | None = Field(None, gt=0)
    """AdamW's peak learning rate. Default: 0.05 for a base of less than 50 million weights, else
    0.009 (the paper's, 7B)."""
    length: int = Field(10, ge=1)
    """Prompt tokens per layer (llama-recipes: 10)."""
    layers: int | None = Field(None, ge=1)
    """Number of layers, counted from the top, that get a prompt. Default: all (llama-recipes: 30 of
    32)."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "c4dt-adapter": Preset(
            "c4dt/pitfalls_in_fine_tuning_llms, which uses the defaults of llama-recipes",
            {"length": 10, "layers": 30},
        ),
    }

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        import torch
        from peft import AdaptionPromptConfig, get_peft_model

        depth = model.config.num_hidden_layers
        if self.layers and self.layers > depth:
            raise UserError(
                f"method 'llama-adapter': layers={self.layers}, but the model has {depth}."
            )
        config = AdaptionPromptConfig(
            adapter_len=self.length, adapter_layers=self.layers or depth, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():  # PEFT draws the prompts from torch's global generator
            torch.manual_seed(derive(seed, "adapter"))
            try:
                return _in_float32(cast("PreTrainedModel", get_peft_model(model, config)))
            except ValueError:
                raise UserError(
                    "method 'llama-adapter' supports Llama, Mistral and GPT-2 models only; this "
                    f"model is of type '{model.config.model_type}'."
                ) from None


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Convert the prompts and gates to float32. PEFT creates them in the base's type, and in
    bfloat16 an AdamW step is smaller than the spacing of numbers near 1."""
    import torch

    for module in model.modules():
        prompt = getattr(module, "adaption_prompt", None)
        if isinstance(prompt, torch.nn.Parameter) and prompt.dtype != torch.float32:
            in_base_type = torch.autocast(prompt.device.type, prompt.dtype)
            module.forward = in_base_type(module.forward)
            for part in (prompt, module.adaption_gate):
                part.data = part.data.float()
    return model
