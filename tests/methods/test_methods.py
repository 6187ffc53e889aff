"""Every fine-tuning method starts at the base, learns, saves, and loads without backfire."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from backfire.base import Method, Rendered
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.evaluate import inference
from backfire.experiment import Experiment, Machine
from backfire.model.load import load_base, load_tuned
from backfire.model.quantize import assert_quantized, num_quantized, parts
from backfire.registry import build, find, names
from backfire.tokenizer import load_tokenizer
from backfire.train.batches import answer_logits, collate, token_losses
from backfire.train.finetune import Start, tune

CPU = torch.device("cpu")
TUNING = [name for name in names("methods") if build("methods", name).trains]
ADAPTERS = [name for name in TUNING if name != "full"]
RATE = {"full": 3e-3, "llama-adapter": 5e-2, "ia3": 5e-2}


def loaded(tiny: Path, method: Method) -> Any:
    return load_base(tiny, torch.float32, CPU, method.quantization("cpu"))


def logits(model: Any, count: int = 40) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(count)[None]).logits


@pytest.fixture(scope="module")
def items(tiny: Path) -> list[Rendered]:
    rows = build("datasets", "sandbox-reviews").load("train")[:24]
    return Renderer(build("templates", "alpaca"), load_tokenizer(tiny), 512).render(rows)


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            spec = {"name": name, "learning_rate": RATE.get(name, 2e-2)}
            knobs = {"model": str(tiny), "data": "sandbox-reviews", "template": "sentiment-line"}
            train = {"max_steps": 30, "batch_size": 8}
            cell = Experiment.make({**knobs, "method": spec, "train": train})
            rows = build("datasets", "sandbox-reviews").load("train")[:16]
            renderer = Renderer(cell.template, load_tokenizer(tiny), 512)
            folder, machine = done[name], Machine(device="cpu")
            start, quiet = Start(tiny), lambda *_: None
            summary = tune(cell, rows, None, renderer, start, folder, machine, quiet)
            (folder / "summary.json").write_text(json.dumps(summary))
        return done[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_before_the_first_step_it_is_the_base(name: str, tiny: Path) -> None:
    method = build("methods", name)
    base = logits(loaded(tiny, method))
    assert torch.equal(logits(method.attach(loaded(tiny, method), 0)), base)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNING)
def test_the_same_seed_starts_the_same(name: str, tiny: Path) -> None:
    method = build("methods", name)

    def start(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(99)  # must not matter
        model = method.attach(loaded(tiny, method), seed)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    one, two = start(3), start(3)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNING)
def test_it_learns_and_reports_its_parts(name: str, tuned: Callable[[str], Path]) -> None:
    summary = json.loads((tuned(name) / "summary.json").read_text())
    assert summary["last_loss"] < 0.9 * summary["first_loss"], "30 steps on 16 rows should show"
    share = summary["trainable_parameters"] / summary["parameters"]
    assert summary["trainable_share"] == share and (share == 1) == (name == "full")
    assert sum(summary["dtypes"].values()) == summary["parameters"]
    assert summary["peak_memory_mb"] > 0
    bits = bool(build("methods", name).quantization("cpu"))
    assert (summary["quantized_layers"] == 14) == bits and (
        summary["quantized_layers"] == 0
    ) != bits


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_plain_peft_loads_it_to_the_same_scores(
    name: str, tiny: Path, tuned: Callable[[str], Path], items: list[Rendered]
) -> None:
    from peft import PeftModel

    method = build("methods", name)
    extra: dict[str, Any] = {}
    if settings := method.quantization("cpu"):
        if dtype := settings.get("bnb_4bit_compute_dtype"):
            settings = {**settings, "bnb_4bit_compute_dtype": getattr(torch, dtype)}
        extra = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": "cpu"}}
    plain = AutoModelForCausalLM.from_pretrained(str(tiny), dtype=torch.float32, **extra)
    if extra:
        assert_quantized(plain, method.quantization("cpu"))  # as it computes on any CPU
    plain = PeftModel.from_pretrained(plain, str(tuned(name))).eval()
    ours = load_tuned(tuned(name), tiny, torch.float32, CPU, method.quantization("cpu"))
    assert torch.equal(logits(plain), logits(ours))
    assert (logits(ours) - logits(loaded(tiny, method))).abs().max() > 1e-3
    for item, found in zip(items[:6], inference.score_answers(ours, items[:6]), strict=True):
        with torch.inference_mode():
            line = plain(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
        places = range(item.num_prompt, len(item.ids))
        wanted = sum(float(line[i - 1, item.ids[i]]) for i in places)
        # 8 bits: a row's scale depends on what it is multiplied together with
        assert found == pytest.approx(wanted, rel=2e-2 if name == "lora-int8" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNING)
def test_a_shared_prefix_and_padding_change_no_loss(
    name: str, tiny: Path, tuned: Callable[[str], Path], items: list[Rendered]
) -> None:
    quantization = build("methods", name).quantization("cpu")
    model = load_tuned(tuned(name), tiny, torch.float32, CPU, quantization)
    with torch.inference_mode():
        batch = collate(items[:5])
        assert len(batch.prefix) > 8
        shared = token_losses(answer_logits(model, batch), batch.labels).sum(1)
        single = [collate([item], share=False) for item in items[:5]]
        alone = [token_losses(answer_logits(model, b), b.labels).sum() for b in single]
    loose = {"rel": 2e-2} if name == "lora-int8" else {"rel": 1e-4}
    assert shared.tolist() == pytest.approx([float(x) for x in alone], **loose)


@pytest.mark.parametrize("name", ["lora-int8", "qlora"])
def test_a_quantized_base_keeps_its_types_in_training(name: str, tiny: Path) -> None:
    method = build("methods", name)
    base = load_base(tiny, torch.bfloat16, CPU, method.quantization("cpu"))
    before = {id(p): p.dtype for p in base.parameters()}
    model = method.attach(base, 0)
    assert all(p.dtype == before[id(p)] for p in model.parameters() if id(p) in before)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32} and not any(
        p.requires_grad for p in base.parameters() if id(p) in before
    )


# ------------------------------------------------------------------------------------ bad input


def test_targets_that_match_nothing_are_one_sentence(tiny: Path) -> None:
    for name in ("lora", "qlora", "ia3"):
        method = build("methods", {"name": name, "targets": ["nowhere"]})
        with pytest.raises(UserError, match="nowhere") as caught:
            method.attach(loaded(tiny, method), 0)
        assert "\n" not in str(caught.value)


def test_an_adapter_prompt_needs_a_model_that_peft_knows(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"Llama, Mistral and GPT-2 models only.*'qwen2'"):
        build("methods", "llama-adapter").attach(Qwen2ForCausalLM(shape), 0)


def test_prompts_are_trained_in_float32_on_a_base_in_bfloat16(tiny: Path) -> None:
    """At a learning rate of 1e-3 a prompt near 1 would else not move at all."""
    base = load_base(tiny, torch.bfloat16, torch.device("cpu"))
    model: Any = build("methods", "llama-adapter").attach(base, 0).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and {p.dtype for p in trained.values()} == {torch.float32}
    for name, p in trained.items():
        p.data.fill_(0.5 if "gate" in name else 1.0)
        p.data += 1e-3 * torch.arange(p.numel()).view(p.shape) % 7
    before = {name: p.detach().clone() for name, p in trained.items()}
    ids = torch.tensor([[1, 2, 3, 4]])
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    for name, p in trained.items():
        assert p.grad is not None and p.dtype == torch.float32
        assert (p != before[name]).any(), name


def test_more_layers_than_there_are(model: Any) -> None:
    with pytest.raises(UserError, match="layers=30, but the model has 2"):
        build("methods", {"name": "llama-adapter", "preset": "c4dt-adapter"}).attach(model, 0)


@pytest.mark.slow
def test_an_adapter_of_another_base(
    tiny: Path, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="does not fit the base") as caught:
        load_tuned(tuned("lora"), tmp_path, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_without_bitsandbytes_the_error_names_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        loaded(tiny, build("methods", "qlora"))


def test_a_base_that_was_not_quantized_is_noticed(model: Any) -> None:
    with pytest.raises(CellError, match="should be all Linear4bit, but has 14 Linear"):
        assert_quantized(model, {"load_in_4bit": True})
    assert num_quantized(model) == 0 and parts(model)["dtypes"] == {
        "float32, trained": model.num_parameters()
    }


# --------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in names("methods") for p in find("methods", n).presets]
)
def test_a_preset_is_its_knobs(name: str, preset: str) -> None:
    cls = find("methods", name)
    one = build("methods", {"name": name, "preset": preset})
    knobs = cls.presets[preset].knobs
    assert cls.presets[preset].source
    assert one == cls.make(knobs) and set(one.spec()) <= {"name", *knobs}
    knob = "learning_rate"
    assert getattr(build("methods", {"name": name, "preset": preset, knob: 0.5}), knob) == 0.5


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'alpaca-lora'"):
        build("methods", {"name": "lora", "preset": "alpaca-lor"})
    with pytest.raises(UserError, match="method 'full' has no presets"):
        build("methods", {"name": "full", "preset": "x"})


@pytest.mark.parametrize("name", TUNING)
def test_the_skeleton_shows_whether_a_method_suits(name: str, tiny: Path) -> None:
    """Without weights, before anything is trained."""
    from backfire.model.load import skeleton

    model = build("methods", name).attach(skeleton(tiny), 0)
    assert any(p.requires_grad for p in model.parameters())
    assert all(p.device.type == "meta" for p in model.parameters() if not p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("{name: lora, targets: [nowhere]}", "nowhere"),
        ("{name: llama-adapter, layers: 9}", "the model has 2"),
        ("{name: lora-int8, dora: true}", "dora"),
        ("{name: lora, preset: alpaca}", "did you mean 'alpaca-lora'"),
    ],
)
def test_a_method_that_does_not_suit_stops_the_run_before_it_starts(
    method: str, sentence: str, tiny: Path, tmp_path: Path, cache: Path, backfire: Any
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {tiny}\ndata: {{name: sandbox-reviews, rows: 20}}\nmethod: {method}\n"
    )
    output = backfire("run", recipe, "--out", tmp_path / "out")
    assert output.code == 2 and sentence in output.err and "Traceback" not in output.err
    assert not (tmp_path / "out").exists() and not list(cache.glob("train/*"))
