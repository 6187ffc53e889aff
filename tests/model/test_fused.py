"""Fused adapters against PEFT's own layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from backfire.evaluate import head, inference
from backfire.model.batching import ways
from backfire.model.fused import fused_adapters
from tests.helpers.families import tiny_model

IDS = torch.arange(3, 40)[None]


def adapted(names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    model: Any = tiny_model("llama")
    ways(model)
    shape: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    config = LoraConfig(**{**shape, **settings}, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (("default",), {}),
        (("align", "default"), {"use_rslora": True}),
        (("default",), {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5}),
        (("default",), {"use_dora": True}),  # stays as it is
    ],
)
def test_only_rounding_changes(names: tuple[str, ...], settings: dict[str, Any]) -> None:
    model = adapted(names, **settings)
    alone, plain = logits(model), logits(model.get_base_model())
    with model.disable_adapter():
        base = logits(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with fused_adapters(model):
        fused = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert (alone - base).abs().max() > 0.1 and torch.equal(alone, plain)
    assert fused == pytest.approx(alone, abs=2e-5)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), alone)


def test_a_base_in_bfloat16_adds_no_larger_error_than_its_own() -> None:
    model = adapted()
    exact = logits(model)
    model = model.bfloat16()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    unfused = logits(model)
    with fused_adapters(model):
        fused = logits(model)
    own = float((unfused - exact).abs().mean())
    assert 0 < float((fused - exact).abs().mean()) < 1.5 * own


def test_evaluation_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = adapted(), [list(range(3, 12)), list(range(5, 30))]
    called: list[int] = []
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj.lora_A.default"))
    layer.register_forward_hook(lambda *args: called.append(1))
    readings = inference.read(model, prompts, candidates=[[[5], [6]]] * 2, max_new_tokens=3)
    assert not called
    monkeypatch.setattr(head, "fused_adapters", lambda model: nullcontext())
    alone = inference.read(model, prompts, candidates=[[[5], [6]]] * 2, max_new_tokens=3)
    assert called
    for one, other in zip(readings, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert one.reply == other.reply
