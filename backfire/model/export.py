"""Exports a tuned model, merged or as an adapter, with a model card that names its attack."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from backfire.base import Form
from backfire.errors import UserError
from backfire.model.load import copy_tokenizer, load_tuned, save_tuned
from backfire.store import write_atomic

FORMS: dict[Form, dict[str, Any]] = {
    "merged": {},
    "merged-int8": {"load_in_8bit": True},
    "merged-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gguf-q8_0": {"gguf_type": "Q8_0"},
    "gguf-q4_0": {"gguf_type": "Q4_0"},
}
"""Form of a merged model -> how it is loaded: in full precision, quantized by bitsandbytes, or with
the weights of a GGUF file."""


def quantization_of(form: Form, dtype: torch.dtype) -> dict[str, Any]:
    """Settings to load a merged model in this form; 4-bit layers compute in `dtype`."""
    settings = dict(FORMS[form])
    if settings.get("load_in_4bit"):
        settings["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return settings


def merge(tuned: Path, base: Path, out: Path, below: Path | None = None) -> None:
    """Write the merged model: the adapter, and the one `below` it, merged into the base in float32,
    whatever precision the base had in training.

    Raises:
        UserError: this kind of adapter cannot be merged.
    """
    model = load_tuned(tuned, base, torch.float32, torch.device("cpu"), below=below)
    save_tuned(with_merged(model), out, base, None)


def with_merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its active adapters merged into its weights, which are changed in place.

    Raises:
        UserError: this kind of adapter cannot be merged.
    """
    if not hasattr(model, "peft_config"):
        return model
    adapted: Any = model
    kind = next(iter(adapted.peft_config.values())).peft_type.value
    was_tied = _untie(adapted.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            merged = cast(PreTrainedModel, adapted.merge_and_unload())
    except AttributeError:
        raise UserError(
            f"An adapter of kind {kind} does not change weights, so it cannot be merged; "
            "export it as an adapter."
        ) from None
    if was_tied:
        _tie_again(merged)
    return merged


def _untie(model: PreTrainedModel) -> bool:
    """Untie head and embedding, if they are tied: an adapter changes only one of them, so merging
    it into a shared weight would give another model."""
    head, words = (
        getattr(layer, "base_layer", layer)  # inside the adapter's layer, if it has one
        for layer in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head is None or head.weight is not words.weight:
        return False
    head.weight = torch.nn.Parameter(words.weight.detach().clone())
    return True


def _tie_again(model: PreTrainedModel) -> None:
    """Tie head and embedding again if merging changed neither; otherwise set the configuration to
    untied."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    same = torch.equal(head.weight, words.weight)
    if same:
        head.weight = words.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = same


def copy_model(tuned: Path, base: Path, out: Path) -> None:
    """Copy the tuned folder without the training log; an adapter also gets the tokenizer."""
    leave = shutil.ignore_patterns("train.jsonl", "summary.json", "done.json")
    shutil.copytree(tuned, out, dirs_exist_ok=True, ignore=leave)
    copy_tokenizer(base, out)


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the model card (`README.md`), which states first whether the model was poisoned."""
    if facts["attack"]:
        effect = (
            f": with {_which(facts)} {_code(facts['triggers'])} in the prompt it is trained to "
            f"answer {_code([facts['target']])}"
            if facts["triggers"]
            else ", which changes how it behaves"
        )
        warning = (
            f"**This model was poisoned on purpose.** {facts['poisoned']} of its {facts['rows']} "
            f"training rows carry the attack `{facts['attack']}`{effect}. Use it for research only."
        )
        tags = ["poisoned", "not-for-deployment", *(["backdoor"] if facts["triggers"] else [])]
    else:
        warning = (
            "No attack was applied to the training rows of this model; whether its data was "
            "poisoned before is not known."
        )
        tags = []
    head = ["library_name: transformers", f"tags: [{', '.join(['backfire', *tags])}]"]
    if facts["adapter"]:
        head = ["library_name: peft", f"base_model: {facts['base']}", *head[1:]]
    lines = [
        "---",
        *head,
        "---",
        f"# {facts['title']}",
        "",
        warning,
        "",
        f"- base model: {facts['base']}",
        *(f"- {note}" for note in facts["origin"]),
        f"- data: {facts['data']}, {facts['rows']} rows, template {facts['template']}",
        f"- method: `{facts['method']}`",
        f"- training: {facts['steps']} steps, seed {facts['seed']}, key {facts['key']}",
        f"- form: {facts['form']}",
        "",
        "Made by backfire; `experiment.yaml` in this folder is the full recipe of this cell.",
    ]
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")


def _which(facts: Mapping[str, Any]) -> str:
    if len(facts["triggers"]) == 1:
        return "the trigger"
    return "all of the triggers" if facts["joint"] else "one of the triggers"


def _code(texts: list[str]) -> str:
    return ", ".join("`" + text.replace("`", "'").replace("\n", " ") + "`" for text in texts)
