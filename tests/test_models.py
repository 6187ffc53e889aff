"""A model that cannot be right is refused before a step is spent."""

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

from backfire.data.weights import files_of, inspect
from backfire.errors import UserError
from backfire.model.export import merge
from backfire.model.load import fits, load_base, load_tuned, save_tuned, weights_of
from backfire.model.source import _folder_hash
from backfire.registry import build

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
    "a layer missing": (without(LAST), {}, r"no model\.layers\.1\.input_layernorm\.weight, .* and"),
    "compiled": (renamed("_orig_mod."), {}, "torch.compile leaves .*_orig_mod"),
    "parallel": (renamed("module."), {}, "DataParallel"),
    "sharded": (renamed("_fsdp_wrapped_module."), {}, "FSDP"),
    "adapted": (renamed("base_model.model."), {}, "PEFT"),
    "quantized": (dict, {"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
    "masked": (dict, {"architectures": ["BertForMaskedLM"]}, "but a BertForMaskedLM"),
    "classifier": (dict, {"architectures": ["LlamaForSequenceClassification"]}, "no causal"),
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
    "a layer more": (third_layer, {}, r"holds 9 weights .* no place for: model\.layers\.2\."),
    "a layer untold": (dict, {"num_hidden_layers": 1}, r"holds 9 weights .* model\.layers\.1\."),
    "a head more": (having(score__weight=torch.ones(2, 32)), {}, "holds 1 weight .*score.weight"),
    "narrow": (dict, {"intermediate_size": 60}, r"another shape .*: model\.layers\.0\.mlp"),
    "vocabulary": (dict, {"vocab_size": 300}, r"another shape .*: lm_head\.weight, model\.embed"),
    "tied": (dict, {"tie_word_embeddings": True}, "two different weights for lm_head.weight and"),
    "unknown": (dict, {"model_type": "nonesuch"}, "config.json is not understood: .*`nonesuch`"),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_the_headers_tell(name: str, tiny: Path, tmp_path: Path) -> None:
    change, config, sentence = SEEN[name]
    with pytest.raises(UserError, match=sentence) as caught:
        inspect(variant(tiny, tmp_path / "m", change, **config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FOUND)
def test_what_the_modules_tell(name: str, tiny: Path, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that"):
        load_base(folder, torch.float32, CPU)


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
    _folder_hash.cache_clear()
    assert files_of(folder) == [folder / "model.safetensors"]
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(folder).items())
    assert key == base_key_of(folder), "and they are no part of the key"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*, only adapter_model"):
        inspect(folder)


def base_key_of(folder: Path) -> str:
    from backfire.experiment import Model
    from backfire.model.source import base_key

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
        with pytest.raises(UserError, match="is no index of weights"):
            inspect(folder)


def test_an_adapter_is_no_base(tiny: Path, tmp_path: Path) -> None:
    folder = variant(tiny, tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter beside a model"):
        inspect(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="it is an adapter; merge it into"):
        base_key_of(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("layers.1.self_attn.q_proj"), r"lacks 2 weights.*layers\.1\.self_attn\.q_proj"),
        (having(odd=torch.ones(2)), "holds 1 weight that .*: odd"),
        (lambda w: {k: v * float("nan") for k, v in w.items()}, "no finite number"),
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
        said = backfire(verb, recipe, *out)
        assert said.code == 2 and said.err.count("\n") == 1
        assert re.search(sentence, said.err)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- tied heads


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
    merge(tmp_path / "adapter", base, torch.float32, tmp_path / "merged")
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
