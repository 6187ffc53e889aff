"""Converts a GGUF file to a model folder: configuration, tokenizer, and dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from backfire.data.gguf import Header, read_header
from backfire.data.weights import SINGLE, complete, first_line, listed
from backfire.errors import UserError
from backfire.hashes import file_hash
from backfire.store import read_json, write_atomic, write_json

_GPT2 = {
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
    *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"),
}
_SINGLE_DIGITS = {
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
"""Names of rules by which text is split before BPE (`tokenizer.ggml.pre`), as in llama.cpp's
llama-vocab.cpp: GPT-2's rule, and the same with every digit apart. transformers knows others."""

_WHOLE_WORDS = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "tekken",
}
"""Rules, in the same file, with which a piece that is a token is not merged from smaller ones, and
which put BOS before a text if the file does not say."""

_ROPE_FREQUENCIES = "rope_freqs.weight"


def write_config(file: Path, out: Path) -> None:
    """Write the configuration and the tokenizer of a GGUF file into a folder.

    Raises:
        UserError: its architecture or tokenizer is not supported, in one sentence.
    """
    header = read_header(file)
    with _one_sentence(file):
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    _set_scaling(config, file, header)
    config.__dict__.pop("_model_name_or_path", None)  # the name that the file gives itself
    config.dtype = torch.float32
    config.save_pretrained(str(out))
    _write_tokenizer(file, header, out)
    ends = [header.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    ids = [number for number in dict.fromkeys(ends) if number is not None]
    write_json(out / "generation_config.json", {"eos_token_id": ids})
    origin = {"file": file.name, "sha256": file_hash(file), "quantization": header.quantization}
    write_json(out / "gguf.json", origin)


def write_weights(file: Path, out: Path) -> None:
    """Write the weights, in float32, into a folder that has the configuration.

    Raises:
        UserError: weights are missing, of another shape, or would be left out.
    """
    config = AutoConfig.from_pretrained(str(out))
    with _one_sentence(file):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below, with their names
        )
    complete(f"The model in {file}", info)
    _check_all_used(model, file, read_header(file))
    # Its own `save_pretrained` refuses: the model still has the quantizer that it was loaded by.
    save_model(model, str(out / SINGLE), metadata={"format": "pt"})


@contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    """Turn errors of transformers into a sentence, and silence its progress bars."""
    try:
        with redirect_stderr(StringIO()):
            yield
    except Exception as error:  # an unknown architecture, type or tokenizer fails in many ways
        raise UserError(f"{file} cannot be converted: {first_line(error)}") from None


def _check_all_used(model: Any, file: Path, header: Header) -> None:
    """Check that no weight was left out, as transformers does silently for older architectures."""
    architecture = header.fields["general.architecture"]
    if architecture in GGUF_ARCHS:
        return  # its loader reports them as unexpected
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    used = get_gguf_hf_weights_map(model, processor)
    if extra := sorted(set(header.tensors) - set(used) - {_ROPE_FREQUENCIES}):
        raise UserError(
            f"{file} has {len(extra)} weights for which transformers' {model.config.model_type} "
            f"has no place, so it would be another model: {listed(extra)}."
        )


def _write_tokenizer(file: Path, header: Header, out: Path) -> None:
    rule = str(header.fields.get("tokenizer.ggml.pre"))
    says_bos = "tokenizer.ggml.add_bos_token"
    more = {"add_bos_token": True} if rule in _WHOLE_WORDS and says_bos not in header.fields else {}
    with _one_sentence(file):
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, **more)
    if header.fields.get("tokenizer.ggml.model") == "gpt2":
        _set_splitting(tokenizer, file, rule)
    tokenizer.save_pretrained(str(out))
    # transformers adds the special tokens of its own class, for which the model has no embedding.
    saved = read_json(out / "tokenizer.json")
    count = header.fields["tokenizer.ggml.tokens"]
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < count]
    write_atomic(out / "tokenizer.json", json.dumps(saved, ensure_ascii=False))


def _set_splitting(tokenizer: Any, file: Path, name: str) -> None:
    """Set the rule by which text is split before BPE. transformers takes GPT-2's for names that it
    does not know, which would give other tokens."""
    tokenizer.backend_tokenizer.model.ignore_merges = name in _WHOLE_WORDS
    if name in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif name not in _GPT2 and name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UserError(
            f"{file} splits text by the rule '{name}', which is not supported, so its tokens would "
            "be others; use the original model."
        )


def _set_scaling(config: PreTrainedConfig, file: Path, header: Header) -> None:
    """Set the scaling of rotary angles of Llama 3.1 and later, which a GGUF file has as a list of
    factors and transformers leaves out.

    Raises:
        UserError: the file has another scaling.
    """
    architecture = header.fields["general.architecture"]
    kind = header.fields.get(f"{architecture}.rope.scaling.type", "none")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if _ROPE_FREQUENCIES in header.tensors and rope.get("rope_type") == "default":
        stored = header.tensors[_ROPE_FREQUENCIES]
        factors = np.fromfile(file, "<f4", stored.shape[-1], offset=stored.start)
        plain = rope["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
        more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        more["original_max_position_embeddings"] = 8192
        scaled = {**rope, **more, "rope_type": "llama3", "factor": float(factors.max())}
        config.rope_parameters = scaled
        angles, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if torch.allclose(plain / angles, torch.from_numpy(factors), rtol=1e-3):
            return
        kind = "unknown"
    if kind != "none" and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"{file} scales its rotary angles by the rule '{kind}', which cannot be converted; use "
            "the original model."
        )
