"""A tiny sequence classifier with random weights, for judges and metrics that load one."""

from __future__ import annotations

from pathlib import Path


def write_classifier(
    folder: Path, tiny_tokenizer: Path, *, num_layers: int = 1, num_positions: int = 140
) -> Path:
    """A RoBERTa with the labels of the toxicity measure's default model; returns the folder."""
    import torch
    from transformers import (
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_tokenizer / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    shape = RobertaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=num_positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
        id2label={0: "nothate", 1: "hate"},
        label2id={"nothate": 0, "hate": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForSequenceClassification(shape).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
