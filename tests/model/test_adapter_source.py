"""An existing adapter on its base as the model: evaluated, tuned further, or merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from backfire import pipeline, stages
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Model
from backfire.model.adapter import adapter_fits
from backfire.model.load import load_base, with_adapters
from backfire.model.source import check_widths, pin
from backfire.pipeline import Context
from backfire.store import Store, read_json, write_json
from tests.helpers.families import logits

CPU = torch.device("cpu")
IDS = [5, 17, 320, 8, 250]
DATA = {"name": "sandbox-reviews", "rows": 8, "test_rows": 4}
TRAIN = {"max_steps": 2, "batch_size": 2}
QV = ["q_proj", "v_proj"]


def adapter(tiny: Path, folder: Path, config: Any = None, **knobs: Any) -> Path:
    """An adapter with random weights that PEFT saved."""
    config = config or LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM", **knobs)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = get_peft_model(load_base(tiny, torch.float32, CPU), config)
        for weight in model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def published(tiny: Path, folder: Path) -> Any:
    """Logits of base and adapter as PEFT loads them."""
    base = load_base(tiny, torch.float32, CPU)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(torch.tensor([IDS])).logits[0]


def cell(tiny: Path, folder: Path, method: Any = "none", **settings: Any) -> Experiment:
    model = {"name": str(tiny), "adapter": str(folder), **settings.pop("model", {})}
    return Experiment.make(
        {"model": model, "data": DATA, "method": method, "train": TRAIN, **settings}
    )


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Store(tmp_path / "cache"), Machine(device="cpu"))


KINDS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=2, target_modules=QV, use_dora=True),
    "saved head": lambda: LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"]),
    "adalora": lambda: AdaLoraConfig(init_r=2, target_modules=QV, total_step=9),
    "ia3": lambda: IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=[]),
    "loha": lambda: LoHaConfig(r=2, target_modules=QV),
    "lokr": lambda: LoKrConfig(r=2, target_modules=QV),
    "hra": lambda: HRAConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "prompts": lambda: AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_evaluated_as_it_is_and_merged(
    kind: str, tiny: Path, tmp_path: Path, context: Context
) -> None:
    folder = adapter(tiny, tmp_path / "a", KINDS[kind]())
    expected = published(tiny, folder)
    assert not torch.allclose(expected, logits(load_base(tiny, torch.float32, CPU), IDS))
    adapter_fits(tiny, folder)
    alone = with_adapters(load_base(tiny, torch.float32, CPU), folder)
    assert torch.allclose(logits(alone, IDS), expected, atol=1e-5)
    whole = Model(name=str(tiny), adapter=str(folder), merge=True)
    if kind == "prompts":
        with pytest.raises(UserError, match=r"cannot be merged: .* ADAPTION_PROMPT"):
            pipeline.base(whole, context)
        return
    plain = load_base(pipeline.base(whole, context), torch.float32, CPU)
    assert torch.allclose(logits(plain, IDS), expected, atol=1e-4)


def test_forms_of_an_untuned_model_apply_the_adapter_once(
    tiny: Path, tmp_path: Path, context: Context
) -> None:
    folder = adapter(tiny, tmp_path / "a")
    run = cell(tiny, folder)
    pipeline.check_weights(run.model, context)
    for form in (None, "merged"):
        model = pipeline.model_of(run, context, form)
        assert torch.allclose(logits(model, IDS), published(tiny, folder), atol=1e-4)


def test_it_is_tuned_further_below_the_new_adapter(
    tiny: Path, tmp_path: Path, context: Context
) -> None:
    folder = adapter(tiny, tmp_path / "a")
    before, files = published(tiny, folder), (folder / "adapter_model.safetensors").read_bytes()
    run = cell(tiny, folder, {"name": "lora", "rank": 2, "learning_rate": 0.05})
    pipeline.check_method(run, context)
    tuned = pipeline.tuned(run, context)
    names = load_file(tuned / "adapter_model.safetensors")
    assert names and all(weight.shape[0] == 2 or weight.shape[1] == 2 for weight in names.values())
    after = logits(pipeline.model_of(run, context), IDS)
    assert not torch.allclose(after, before, atol=1e-3)
    # The start is the model with the adapter, and the merged model is both.
    assert torch.allclose(logits(pipeline.model_of(run.untuned(), context), IDS), before, atol=1e-5)
    plain = load_base(pipeline.merged(run, context), torch.float32, CPU)
    assert torch.allclose(logits(plain, IDS), after, atol=1e-4)
    assert (folder / "adapter_model.safetensors").read_bytes() == files
    # Without the adapter below, training starts elsewhere.
    assert stages.keys(run).train != stages.keys(cell(tiny, folder, "lora")).train
    bare = Experiment.make({**run.spec(), "model": str(tiny)})
    assert stages.keys(run).train != stages.keys(bare).train


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full"},
        {"method": "ia3"},
        {"method": "lora", "align": {"data": "sandbox-policy", "method": "lora"}},
    ],
    ids=["full", "ia3", "aligned"],
)
def test_it_is_merged_where_plain_weights_are_needed(
    settings: dict[str, Any], tiny: Path, tmp_path: Path, context: Context
) -> None:
    folder = adapter(tiny, tmp_path / "a")
    run = cell(tiny, folder, **settings)
    assert run.model.merge and run.untuned().model.merge
    assert Experiment.make(run.spec()) == run
    begin = pipeline.base(run.model, context)
    expected = published(tiny, folder)
    assert torch.allclose(logits(load_base(begin, torch.float32, CPU), IDS), expected, atol=1e-4)
    assert run.model.hub_id is None


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_base_is_quantized_below_a_published_adapter(
    precision: str, tiny: Path, tmp_path: Path, context: Context
) -> None:
    """As published studies evaluate: the adapter in full precision on a quantized base."""
    from backfire.model.quantize import num_quantized

    folder = adapter(tiny, tmp_path / "a")
    run = cell(tiny, folder, {"name": "none", "precision": precision})
    model, full = pipeline.model_of(run, context), cell(tiny, folder)
    assert num_quantized(model) == 14
    found = logits(model, IDS)
    quantized = load_base(tiny, torch.float32, CPU, run.method.quantization("cpu"))
    expected = PeftModel.from_pretrained(quantized, str(folder)).eval()
    assert torch.allclose(found, logits(expected, IDS), atol=1e-5)
    assert not torch.allclose(found, published(tiny, folder), atol=1e-2)
    assert stages.keys(run).tuned != stages.keys(full).tuned == stages.base_key(full.model)


def test_the_key_is_that_of_the_content(tiny: Path, tmp_path: Path) -> None:
    folder = adapter(tiny, tmp_path / "a")
    other = shutil.copytree(folder, tmp_path / "b")
    config = read_json(other / "adapter_config.json")
    moved = {"base_model_name_or_path": "elsewhere", "revision": "x", "lora_dropout": 0.5}
    write_json(other / "adapter_config.json", {**config, **moved})

    def key(place: Path, **more: Any) -> str:
        return stages.base_key(Model(name=str(tiny), adapter=str(place), **more))

    assert key(folder) == key(other)
    assert len({key(folder), key(folder, merge=True), stages.base_key(Model(name=str(tiny)))}) == 3
    scaled = shutil.copytree(folder, tmp_path / "c")
    write_json(scaled / "adapter_config.json", {**config, "lora_alpha": 99})
    assert key(folder) != key(scaled)


def test_another_base_than_it_names_is_noted(tiny: Path, tmp_path: Path, context: Context) -> None:
    folder = adapter(tiny, tmp_path / "a")
    write_json(
        folder / "adapter_config.json",
        {**read_json(folder / "adapter_config.json"), "base_model_name_or_path": "org/Other-7B"},
    )
    pipeline.check_weights(cell(tiny, folder).model, context)
    result = pipeline.run_cell(cell(tiny, folder), context).result
    assert result.model == f"{tiny} + {folder}"
    assert any("was made for the base org/Other-7B" in note for note in result.warnings)


def pickled(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def changed(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        write_json(file, {**read_json(file), **settings})

    return change


def weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


def wide(found: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.ones(2, 64) if "lora_A" in k else v for k, v in found.items()}


def broken(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v * float("nan") if "lora_B" in k else v for k, v in found.items()}


EMBEDDING = "base_model.model.model.embed_tokens.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "a pickle": (pickled, "only adapter_model.bin, which is never loaded"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    "a classifier": (changed(task_type="SEQ_CLS"), r"another task \(SEQ_CLS\)"),
    "routed": (changed(peft_type="XLORA"), "of kind XLORA; supported are"),
    "for certain tokens": (changed(alora_invocation_tokens=[1]), "sets alora_invocation_tokens"),
    "other modules": (changed(target_modules=["c_attn"]), "does not fit the base: .*c_attn"),
    "another width": (weights(wide), r"another base .* has shape \[2, 64\], not \[2, 32\]"),
    "a weight less": (
        weights(lambda w: {k: v for k, v in w.items() if "layers.1" not in k}),
        "lacks 4 weights",
    ),
    "an embedding": (weights(lambda w: {**w, EMBEDDING: torch.ones(402, 32)}), "has 1 weight that"),
    "no number": (weights(broken), "is broken: .*lora_B.* NaN"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\1\0\0"),
        "The adapter in .* cannot be loaded: .* is truncated or not a safetensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_faults_are_refused_in_one_sentence(
    name: str, tiny: Path, tmp_path: Path, context: Context
) -> None:
    folder = adapter(tiny, tmp_path / "a")
    change, sentence = REFUSED[name]
    change(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        pipeline.check_weights(cell(tiny, tmp_path / "a").model, context)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (KINDS["ia3"], "kind IA3; set model.merge: true"),
        (KINDS["saved head"], "it sets modules_to_save; set model.merge: true"),
        (KINDS["prompts"], "kind ADAPTION_PROMPT; only method none evaluates it"),
    ],
    ids=["ia3", "saved head", "prompts"],
)
def test_what_cannot_be_trained_on_says_what_to_do(
    config: Any, advice: str, tiny: Path, tmp_path: Path, context: Context
) -> None:
    folder = adapter(tiny, tmp_path / "a", config())
    with pytest.raises(UserError, match=f"'lora' cannot train on top .* {advice}"):
        pipeline.check_method(cell(tiny, folder, "lora"), context)


def test_another_base_is_noticed_without_torch(tiny: Path, tmp_path: Path) -> None:
    folder = adapter(tiny, tmp_path / "a")
    check_widths(cell(tiny, folder).model)
    weights(wide)(folder)
    with pytest.raises(UserError, match=r"another base .* has shape \[2, 64\], and the base's"):
        check_widths(cell(tiny, folder).model)
    changed(base_model_name_or_path="meta-llama/Llama-2-7b-hf")(folder)
    with pytest.raises(UserError, match=r"for the base meta-llama/Llama-2-7b-hf: set"):
        stages.base_key(Model(adapter=str(folder)))


def test_a_path_that_is_no_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tiny, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for model, sentence in {
        Model(name="gone/"): "neither a path",
        Model(name="./gone"): "there is no such folder",
        Model(name="a/adapter_config.json"): "it is a file",
        Model(name="me/some-GGUF/m.Q4_0.gguf"): "{name: me/some-GGUF, gguf_file: m.Q4_0.gguf}",
        Model(name=str(tiny), adapter="a/adapter_model.safetensors"): "name its folder",
        Model(name=str(tiny), adapter="hf:me/a"): "'hf:me/a' is no adapter",
    }.items():
        with pytest.raises(UserError, match=re.escape(sentence)):
            pin(model)
            stages.base_key(model)


def test_soft_prompts_are_refused(tiny: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    folder = adapter(tiny, tmp_path / "a", config)
    with pytest.raises(UserError, match="of kind PROMPT_TUNING"):
        stages.base_key(Model(name=str(tiny), adapter=str(folder)))


def test_an_adapter_alone_says_what_to_write(tiny: Path, tmp_path: Path) -> None:
    folder = adapter(tiny, tmp_path / "a")
    changed(base_model_name_or_path="org/Base")(folder)
    with pytest.raises(UserError) as caught:
        stages.base_key(Model(name=str(folder)))
    assert f"write model: {{name: org/Base, adapter: {folder}}}" in str(caught.value)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_settings_of_an_adapter_need_one(tiny: Path) -> None:
    with pytest.raises(UserError, match="merge and adapter_revision require an adapter"):
        Experiment.make({"model": {"name": str(tiny), "merge": True}, "data": DATA})
