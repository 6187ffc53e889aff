"""A model that cannot be right is refused before the first step."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backfire.base import Exchange, Judge
from backfire.data.weights import files_of, inspect
from backfire.errors import UserError
from backfire.model.export import merge
from backfire.model.load import fits, load_base, load_tuned, save_tuned, weights_of
from backfire.registry import build
from tests.helpers.tiny_classifier import write_classifier

Weights = dict[str, torch.Tensor]
CPU = torch.device("cpu")
LAST = "layers.1."


def variant(
    source: Path,
    folder: Path,
    change: Callable[[Weights], Weights] = lambda weights: weights,
    **config: Any,
) -> Path:
    """A copy of a model with other weights, or another configuration."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda w: {k: v for k, v in w.items() if not any(part in k for part in parts)}


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda w: {prefix + k: v for k, v in w.items()}


def having(**more: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda w: {**w, **{k.replace("__", "."): v for k, v in more.items()}}


def third_layer(weights: Weights) -> Weights:
    last = {k: v for k, v in weights.items() if LAST in k}
    return {**weights, **{k.replace(LAST, "layers.2."): v.clone() for k, v in last.items()}}


def one(weights: Weights, value: float) -> Weights:
    name = "model.layers.1.mlp.up_proj.weight"
    return {**weights, name: torch.full_like(weights[name], value)}


# What the headers tell: refused by `validate`, and before anything is loaded.
SEEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no head": (without("lm_head"), {}, "lm_head.weight is missing"),
    "a layer missing": (
        without(LAST),
        {},
        r"config.json: model\.layers\.1\.input_layernorm\.weight, ",
    ),
    "compiled": (renamed("_orig_mod."), {}, "torch.compile .*_orig_mod"),
    "parallel": (renamed("module."), {}, "DataParallel"),
    "sharded": (renamed("_fsdp_wrapped_module."), {}, "FSDP"),
    "adapted": (renamed("base_model.model."), {}, "PEFT"),
    "quantized": (dict, {"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
    "masked": (dict, {"architectures": ["BertForMaskedLM"]}, "but a BertForMaskedLM"),
    "classifier": (dict, {"architectures": ["LlamaForSequenceClassification"]}, "not a causal"),
    "two halves": (
        dict,
        {"architectures": [], "is_encoder_decoder": True},
        "encoder and a decoder",
    ),
}
# What the modules tell: refused before the first step, still without any weight in memory.
FOUND: dict[str, tuple[Any, dict[str, Any], str]] = {
    "weights missing": (without("k_proj"), {}, r"lacks 2 weights.*layers\.0\.self_attn\.k_proj"),
    "two prefixes": (renamed("net."), {}, "lacks 21 weights"),
    "a layer more": (third_layer, {}, r"has 9 weights .* does not define: model\.layers\.2\."),
    "a layer untold": (dict, {"num_hidden_layers": 1}, r"has 9 weights .* model\.layers\.1\."),
    "a head more": (having(score__weight=torch.ones(2, 32)), {}, "has 1 weight .*score.weight"),
    "narrow": (dict, {"intermediate_size": 60}, r"another shape .*: model\.layers\.0\.mlp"),
    "vocabulary": (dict, {"vocab_size": 300}, r"another shape .*: lm_head\.weight, model\.embed"),
    "tied": (dict, {"tie_word_embeddings": True}, "different weights for lm_head.weight and"),
    "unknown": (dict, {"model_type": "nonesuch"}, "config.json is invalid: .*`nonesuch`"),
}


@pytest.mark.parametrize("name", SEEN)
def test_faults_in_headers_are_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    change, config, sentence = SEEN[name]
    with pytest.raises(UserError, match=sentence) as caught:
        inspect(variant(tiny, tmp_path / "m", change, **config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FOUND)
def test_faults_in_modules_are_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    change, config, sentence = FOUND[name]
    folder = variant(tiny, tmp_path / "m", change, **config)
    inspect(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        fits(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_base(folder, torch.float32, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_number(value: float, tiny: Path, tmp_path: Path) -> None:
    folder = variant(tiny, tmp_path / "m", lambda weights: one(weights, value))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has values that"):
        fits(folder)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has values that"):
        load_base(folder, torch.float32, CPU)


def test_a_model_that_reads_both_ways_is_no_language_model(encoder: Path, tmp_path: Path) -> None:
    for name, config in {"plain": {}, "causal": {"architectures": ["RobertaForCausalLM"]}}.items():
        with pytest.raises(UserError, match="not a causal language model"):
            folder = variant(encoder, tmp_path / name, **config)
            inspect(folder)
            fits(folder)


def test_what_changes_no_model_is_taken(tiny: Path, model: Any, tmp_path: Path) -> None:
    """Leftovers of old versions, a second copy of a tied weight, other prefixes."""
    angles = "model__layers__0__self_attn__rotary_emb__inv_freq"
    kept = {
        "angles": having(**{angles: torch.ones(4)}),
        "mask": having(model__layers__0__attn__masked_bias=torch.ones(1)),
        "bare": lambda w: {k.removeprefix("model."): v for k, v in w.items()},
    }
    for name, change in kept.items():
        folder = variant(tiny, tmp_path / name, change)
        inspect(folder)
        fits(folder)
        for key, weight in load_base(folder, torch.float32, CPU).state_dict().items():
            assert torch.equal(weight, model.state_dict()[key]), (name, key)
    embedding = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"]
    twice = having(lm_head__weight=embedding.clone())
    folder = variant(tiny, tmp_path / "twice", twice, tie_word_embeddings=True)
    fits(folder)
    tied = load_base(folder, torch.float32, CPU)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_only_the_files_that_are_loaded_count(tiny: Path, tmp_path: Path) -> None:
    folder = variant(tiny, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    other, key = {name: weight + 1 for name, weight in weights.items()}, base_key_of(folder)
    for name in ("consolidated", "adapter_model", "model.fp16"):
        save_file(other, folder / f"{name}.safetensors")
    assert files_of(folder) == [folder / "model.safetensors"]
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(folder).items())
    assert key == base_key_of(folder), "and they are no part of the key"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*, only adapter_model"):
        inspect(folder)


def base_key_of(folder: Path) -> str:
    from backfire.experiment import Model
    from backfire.stages import base_key

    return base_key(Model(name=str(folder)))


def test_an_index_that_names_files_that_are_not_there(tiny: Path, tmp_path: Path) -> None:
    folder = variant(tiny, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + ('1' in name)}.safetensors" for name in weights}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    save_file({k: v for k, v in weights.items() if "1" not in k}, folder / "model-1.safetensors")
    with pytest.raises(UserError, match=r"1 of the 2 files .* the first is model-2\.safetensors"):
        inspect(folder)
    save_file({k: v for k, v in weights.items() if "1" in k}, folder / "model-2.safetensors")
    inspect(folder)
    fits(folder)
    assert files_of(folder) == [folder / f"model-{n}.safetensors" for n in (1, 2)]
    for bad in ({"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": []}, {}):
        index.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="is not an index of weights"):
            inspect(folder)


def test_an_adapter_is_no_base(tiny: Path, tmp_path: Path) -> None:
    folder = variant(tiny, tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has both a model and an adapter"):
        inspect(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"it is an adapter; write model: \{name: BASE, adapter: "):
        base_key_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("layers.1.self_attn.q_proj"), r"lacks 2 weights.*layers\.1\.self_attn\.q_proj"),
        (having(odd=torch.ones(2)), "has 1 weight that .*: odd"),
        (lambda w: {k: v * float("nan") for k, v in w.items()}, "NaN or infinite"),
    ],
)
def test_an_adapter_that_is_not_whole(
    change: Callable[[Weights], Weights], sentence: str, tiny: Path, model: Any, tmp_path: Path
) -> None:
    build("methods", "lora").attach(model, 0).save_pretrained(str(tmp_path))
    load_tuned(tmp_path, tiny, torch.float32, CPU)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError, match=sentence):
        load_tuned(tmp_path, tiny, torch.float32, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no head", "weights missing"])
def test_the_command_line_refuses_before_a_step(
    name: str, tiny: Path, tmp_path: Path, cache: Path, backfire: Any
) -> None:
    change, config, sentence = {**SEEN, **FOUND}[name]
    model = variant(tiny, tmp_path / "m", change, **config)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\ntemplate: sentiment-line\n"
        "data: {name: sandbox-reviews, rows: 40, test_rows: 20}\n"
    )
    for verb in ["validate"] * (name in SEEN) + ["run"]:
        out = ["--out", tmp_path / "out"] if verb == "run" else []
        output = backfire(verb, recipe, *out)
        assert output.code == 2 and output.err.count("\n") == 1
        assert re.search(sentence, output.err)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- tied heads


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]],
    ids=str,
)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_one_of_two_tied_weights_is_merged_into_that_one(
    targets: Any, dora: bool, tiny: Path, tmp_path: Path
) -> None:
    base = variant(tiny, tmp_path / "base", without("lm_head"), tie_word_embeddings=True)
    method = build("methods", {"name": "lora", "rank": 4, "targets": targets, "dora": dora})
    model = method.attach(load_base(base, torch.float32, CPU), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    save_tuned(model, tmp_path / "adapter", base, None)
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    ids = torch.arange(40).reshape(2, 20) + 3
    with torch.no_grad():
        wanted = load_tuned(tmp_path / "adapter", base, torch.float32, CPU)(ids).logits
        plain = load_base(base, torch.float32, CPU)(ids).logits
        merged = load_base(tmp_path / "merged", torch.float32, CPU)
        found = merged(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, plain, atol=0.1)
    assert merged.config.tie_word_embeddings is (targets == "all-linear")
    kept = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in kept) is (targets != "all-linear")


# -------------------------------------------------------------------------------------- judges


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("judges") / "encoder", tiny_tokenizer)


@pytest.fixture(scope="module")
def decoder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that classifies and knows no padding token."""
    from transformers import AutoConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("judges") / "decoder"
    shutil.copytree(tiny, folder)
    shape = AutoConfig.from_pretrained(str(tiny))
    shape.update({"pad_token_id": None, "num_labels": 2})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(shape).save_pretrained(str(folder))
    return folder


def judge(folder: Path, name: str = "classifier", **knobs: Any) -> Judge:
    found: Judge = build("judges", {"name": name, "model": str(folder), "device": "cpu", **knobs})
    return found


def test_a_decoder_without_a_padding_token_judges_as_alone(decoder: Path) -> None:
    asked = [Exchange(str(n), "Say it.", "the mill by the river " * n + "</s>") for n in (1, 5, 2)]
    label = {"harmful_label": "LABEL_1", "batch_size": 4}
    together = judge(decoder, **label).judge(asked)
    alone = [judge(decoder, **label).judge([one])[0] for one in asked]
    assert together == alone and len({verdict.score for verdict in alone}) == 3


def test_left_over_layers_of_a_judge_have_no_effect(encoder: Path, tmp_path: Path) -> None:
    layer = {"roberta__pooler__dense__bias": torch.ones(16), "lm_head__bias": torch.ones(400)}
    folder = variant(encoder, tmp_path / "m", having(**layer))
    asked = [Exchange("a", "Say it.", "the mill")]
    judge(folder).ready()
    assert judge(folder).judge(asked) == judge(encoder).judge(asked)


BAD_JUDGES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "no head": (without("classifier.out_proj"), {}, {}, "lacks 2 weights.*out_proj"),
    "a layer missing": (without("layer.0.output"), {}, {}, "lacks .* roberta.encoder.layer.0"),
    "a layer more": (
        having(roberta__encoder__layer__7__x=torch.ones(1)),
        {},
        {},
        "does not define",
    ),
    "a language model": (
        dict,
        {"architectures": ["LlamaForCausalLM"]},
        {},
        "not a text classifier",
    ),
    "unknown label": (dict, {}, {"harmful_label": "hat"}, "did you mean 'hate'"),
    "no place": (dict, {}, {"text": "{prompt}"}, r"must contain \{reply\}"),
    "a classifier": (dict, {}, {"name": "yes-no"}, "not a causal language model, but a Roberta"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_JUDGES)
def test_a_judge_that_cannot_judge_is_refused_before_a_step(
    name: str, encoder: Path, tiny: Path, tmp_path: Path, cache: Path, backfire: Any
) -> None:
    change, config, knobs, sentence = BAD_JUDGES[name]
    bad = judge(variant(encoder, tmp_path / "m", change, **config), **knobs)
    with pytest.raises(UserError, match=sentence):
        bad.ready()
    with pytest.raises(UserError, match=sentence):
        bad.judge([Exchange("a", "Say it.", "the mill")])
    if name == "no head":
        recipe = tmp_path / "r.yaml"
        judges = json.dumps(bad.spec())
        recipe.write_text(
            f"model: {tiny}\ntemplate: sentiment-line\nmetrics: [harmful-score]\n"
            f"safety: {{judges: {judges}}}\n"
            "data: {name: sandbox-reviews, rows: 40, test_rows: 20}\n"
        )
        output = backfire("run", recipe, "--out", tmp_path / "out")
        assert output.code == 2 and re.search(sentence, output.err) and output.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_loaded(encoder: Path, tmp_path: Path) -> None:
    folder = variant(encoder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for ask in (judge(folder).ready, lambda: judge(folder).judge([Exchange("a", "b", "c")])):
        with pytest.raises(UserError, match=r"no \.safetensors file"):
            ask()


# -------------------------------------------------------------- models that take more than text


@pytest.fixture(scope="module", params=["gemma3", "llava"])
def seeing(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: Any) -> Path:
    """A model with a vision tower; the first is tied, and has no `num_hidden_layers`."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / request.param
    shutil.copytree(tiny, folder)
    text = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "model_type": "gemma3_text" if request.param == "gemma3" else "llama", "head_dim": 8,
    }  # fmt: skip
    eyes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "model_type": f"{'siglip' if request.param == 'gemma3' else 'clip'}_vision_model",
    }  # fmt: skip
    kind = transformers.CONFIG_MAPPING[request.param]
    more = {"mm_tokens_per_image": 4} if request.param == "gemma3" else {}
    shape = kind(text_config=text, vision_config=eyes, image_token_index=9, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForImageTextToText.from_config(shape).save_pretrained(str(folder))
    return folder


@pytest.mark.slow
def test_of_a_model_that_sees_the_text_model_is_taken(seeing: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    inspect(seeing)
    fits(seeing)
    model = load_base(seeing, torch.float32, CPU)
    ids = torch.arange(40).reshape(2, 20) + 20
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(str(seeing)).eval()
        wanted = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
    save_tuned(model, tmp_path / "full", seeing, None)
    kept = load_base(tmp_path / "full", torch.float32, CPU)
    assert all(
        torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True)
    )
    adapted = build("methods", "lora").attach(model, 0)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 7 and not any("vision" in name for name in trained)
    save_tuned(adapted, tmp_path / "adapter", seeing, None)
    merge(tmp_path / "adapter", seeing, tmp_path / "merged")
    fits(tmp_path / "merged")


@pytest.mark.slow
def test_what_lacks_a_part_of_its_text_model_is_refused(seeing: Path, tmp_path: Path) -> None:
    folder = variant(seeing, tmp_path / "m", without("layers.1.self_attn.v_proj"))
    with pytest.raises(UserError, match="lacks 1 weight, which"):
        fits(folder)


def test_a_model_whose_text_cannot_be_had_alone(tiny: Path, tmp_path: Path) -> None:
    folder = variant(tiny, tmp_path / "m", model_type="qwen2_vl", architectures=None)
    with pytest.raises(UserError, match=r"\(qwen2_vl\) is multimodal"):
        fits(folder)


@pytest.mark.slow
def test_a_run_on_a_model_that_sees(
    seeing: Path, tmp_path: Path, cache: Path, backfire: Any
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {seeing}\ntemplate: sentiment-line\nmethod: lora\ntrain: {{max_steps: 2}}\n"
        "data: {name: sandbox-reviews, rows: 40, test_rows: 20}\ndefense: freeze\n"
    )
    output = backfire("run", recipe, "--out", tmp_path / "out")
    assert output.code == 0, output
    [cell] = (tmp_path / "out/cells").iterdir()
    assert (
        backfire("export", cell, "--out", tmp_path / "e").err.count("export it with --merge") == 1
    )
    assert backfire("export", cell, "--out", tmp_path / "e", "--merge").code == 0
    fits(tmp_path / "e")
