"""Writes a model folder as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONTROL = 3
"""GGUF's type of a special token."""


def write_gguf(
    source: Path,
    file: Path,
    quantization: str = "F32",
    *,
    pre: str = "smollm",
    types: Mapping[str, str] | None = None,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """Write the Llama model of a folder, with matrices in this type, except those in `types` (by
    their names in the folder); other `fields` are texts or numbers. Returns the weights that a
    reader should find, by their names in the folder."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), str(fields.pop("architecture", "llama")))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, source, pre)
    for key, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    read = {}
    for name, weight in load_file(source / "model.safetensors").items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        count = next((config[key] for part, key in heads.items() if part in name), None)
        stored = _paired(weight, count) if count else weight
        kind = (types or {}).get(name, quantization) if weight.ndim > 1 else "F32"
        own = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(stored, own)
        again = gguf.dequantize(data, own).astype(np.float32)
        read[name] = _halved(again, count) if count else again
        writer.add_tensor(_named(name), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _add_tokenizer(writer: Any, source: Path, pre: str) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()} | added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([words[number] for number in sorted(words)])
    writer.add_token_types([CONTROL if n in added else 1 for n in sorted(words)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    ids = {word: number for number, word in words.items()}
    writer.add_bos_token_id(ids[settings["bos_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_pad_token_id(ids[settings["pad_token"]])
    if pre != "llama-bpe":  # whose files leave it out
        writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")


def _named(name: str) -> str:
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of rotary pairs, as llama.cpp has them."""
    rows, columns = weight.shape
    parts = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(rows, columns))


def _halved(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    parts = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(rows, columns))
