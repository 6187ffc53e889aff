"""A tokenizer of 400 tokens and a two-layer Llama with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path


def write_tiny_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer, trained on some of the sandbox's text."""
    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.corpus import corpus
    from backfire.train.pretrain import write_tokenizer

    folder.mkdir(parents=True)
    settings = Pretrain(vocab_size=400, tokenizer_documents=200, max_length_tokens=1024)
    write_tokenizer(corpus(0, 200), settings, folder)
    return folder


def write_tiny_model(tokenizer: Path, folder: Path) -> Path:
    """A model folder with random weights and a copy of the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer, folder)
    shape = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # large enough that answers differ from one prompt to the next
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(str(folder))
    return folder
