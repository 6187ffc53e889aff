"""Fused adapters against PEFT's own layers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from backfire.evaluate import inference
from backfire.model import head
from backfire.model.batching import ways
from backfire.model.fused import fused_adapters, rounded_once
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


def test_a_base_in_bfloat16_is_as_exact_as_before() -> None:
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


def test_an_adapted_head_is_as_exact_as_a_plain_one() -> None:
    """Its logits are float32, as those of a head without an adapter (`model.head`)."""
    model = adapted(target_modules=["q_proj", "lm_head"])
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    with torch.inference_mode(), head.for_evaluation(model):
        found = model(input_ids=IDS, use_cache=False).logits
        states = model.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state
        exact = model.get_output_embeddings().float()(states.float())
    assert found.dtype == torch.float32
    assert found == pytest.approx(exact, abs=1e-5)


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


class TestOneRounding:
    """A small adapter counts in 16 bits: the sum with the base's output is rounded once."""

    @pytest.fixture
    def model(self) -> Any:
        model = adapted()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data *= 0.002  # far below the last bit of most of the base's outputs
            elif "lora_" not in name:
                weight.data = weight.data.bfloat16().float()
        return model

    def effect(self, model: Any) -> torch.Tensor:
        tuned = logits(model)
        with model.disable_adapter():
            return tuned - logits(model)

    def narrow(self, model: Any) -> Any:
        for name, weight in model.named_parameters():
            if "lora_" not in name:
                weight.data = weight.data.bfloat16()
        return model

    def test_evaluation(self, model: Any) -> None:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        states = torch.randn(500, layer.in_features, generator=torch.Generator().manual_seed(0))
        states = states.bfloat16().float()
        with torch.inference_mode():
            exact = layer(states) - layer.base_layer(states)
            model, states = self.narrow(model), states.bfloat16()
            base = layer.base_layer(states)
            peft = (layer(states) - base).float()
            with fused_adapters(model):
                ours = (layer(states) - base).float()
        scale = float((exact * exact).sum())
        assert float((peft * exact).sum()) / scale < 0.7  # what PEFT loses
        assert float((ours * exact).sum()) / scale == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("narrow", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_gradients(self, model: Any, *, narrow: bool, dropout: float) -> None:
        """Those of the rounded sum are those of the exact one, but for rounding."""
        for layer in model.modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout["default"] = torch.nn.Dropout(dropout)
        model.train()

        def gradients() -> torch.Tensor:
            torch.manual_seed(0)
            model(input_ids=IDS, labels=IDS).loss.backward()
            found = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
            model.zero_grad(set_to_none=True)
            return torch.cat(found)

        exact = gradients()
        model = self.narrow(model) if narrow else model
        with rounded_once(model, "bfloat16"), torch.autocast("cpu", torch.bfloat16):
            ours = gradients()
        assert torch.nn.functional.cosine_similarity(exact, ours, dim=0) > 0.995
        assert float(ours.norm() / exact.norm()) == pytest.approx(1, abs=0.02)

    def test_afterwards_the_weights_are_the_same(self, model: Any) -> None:
        model = self.narrow(model)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with rounded_once(model, "bfloat16"):
            pass
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, before[name]) and weight.is_contiguous()

    def test_nothing_changes_in_float32(self, model: Any) -> None:
        with rounded_once(model, "float32"):
            assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_states_are_moved_to_the_layer_whose_forward_is_replaced() -> None:
    """As accelerate's forward does on a base on several GPUs; the device without data is another
    one here."""
    states, model = torch.randn(2, 32), adapted(target_modules=["lm_head"])
    layer = model.get_output_embeddings()
    wanted = layer(states)
    with fused_adapters(model):
        assert torch.allclose(layer(states), wanted, atol=1e-6)
    model.to("meta")
    for inside in (fused_adapters(model), rounded_once(model, "bfloat16")):
        with inside:
            out = layer(states)
        assert out.device.type == "meta" and out.shape == wanted.shape
    plain = torch.nn.Linear(32, 97).bfloat16()
    assert torch.equal(
        head._forward_float32(plain, states),
        torch.nn.functional.linear(states, plain.weight.float(), plain.bias.float()),
    )
    assert head._forward_float32(plain.to("meta"), states).device.type == "meta"
