from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from backfire.base import Preset
from backfire.methods.lora import LoRA
from backfire.registry import register

_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@register("qlora", version=2)
class QLoRA(LoRA):
    """LoRA on a frozen base in 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    double_quantization: bool = True
    """Quantize the quantization constants too (paper, section 3)."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which products with the base are computed; `auto`: bfloat16 on a GPU (float16 where
    it lacks that), else float32. Without a value bitsandbytes silently uses float32 everywhere."""
    paged_optimizer: bool = True
    """Whether AdamW's state may move to main memory; only on a GPU."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "multilingual-qlora": Preset(
            "AmoghJ001/Llama2_LORA_Finetune_Multilingual_Sentiment_Analysis",
            {
                "rank": 16,
                "alpha": 64,
                "dropout": 0.1,
                "targets": _ALL,
                "learning_rate": 1e-4,
                "double_quantization": False,
                "compute": "float16",
            },
        ),
        "c4dt-qlora": Preset(
            "c4dt/pitfalls_in_fine_tuning_llms, bnb.nf4",
            {
                "rank": 8,
                "alpha": 16,
                "dropout": 0.05,
                "targets": ["q_proj", "v_proj"],
                "learning_rate": 2e-4,
                "double_quantization": False,
            },
        ),
    }

    def resolved(self, device: str, compute: str = "bfloat16") -> Self:
        auto = compute if device == "cuda" else "float32"
        return self.model_copy(update={"compute": auto}) if self.compute == "auto" else self

    def quantization(self, device: str) -> dict[str, Any]:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quantization,
            "bnb_4bit_compute_dtype": self.resolved(device).compute,
        }

    def paged(self) -> bool:
        return self.paged_optimizer
