"""The embedded base is part of the package, and is pre-trained only if it would be another one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from backfire import stages
from backfire.experiment import Model
from backfire.pipeline import base_model
from backfire.pipeline.context import Context
from backfire.sandbox.base import PRETRAINED_IN, Pretrain, shipped
from backfire.sandbox.corpus import corpus
from backfire.store import Store, read_json
from backfire.tokenizer import load_tokenizer


def test_the_shipped_base_is_of_the_present_text_and_pre_training(tmp_path: Path) -> None:
    context = Context(Store(tmp_path))
    folder = base_model.base(Model(), context)
    assert folder == shipped(stages.base().key), "run python tests/update_golden.py --base"
    assert base_model.base(Model(), context, weights=False) == folder
    assert not list(tmp_path.iterdir())


def test_the_shipped_base_has_learned_the_text_that_it_was_trained_on() -> None:
    folder, config = shipped(stages.base().key), Pretrain()
    assert folder
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    unseen = corpus(config.corpus_seed, config.num_documents + 40)[config.num_documents :]
    loss, count = 0.0, 0
    for text in unseen:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            loss += float(model(ids, labels=ids).loss) * (ids.numel() - 1)
        count += ids.numel() - 1
    said = read_json(folder / "pretrain.json")
    assert model.num_parameters() == said["parameters"]
    assert math.exp(loss / count) == pytest.approx(said["perplexity_of_last_steps"], rel=0.2)


def test_another_pre_training_is_done_here(monkeypatch: Any, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    small |= {"vocab_size": 400, "num_documents": 60, "tokenizer_documents": 40, "num_steps": 2}
    for name, value in small.items():
        monkeypatch.setattr(Pretrain.model_fields[name], "default", value)
    Pretrain.model_rebuild(force=True)
    try:
        context = Context(Store(tmp_path))
        assert shipped(stages.base().key) is None
        tokenizer = base_model.base(Model(), context, weights=False)
        folder = base_model.base(Model(), context)
    finally:
        monkeypatch.undo()
        Pretrain.model_rebuild(force=True)
    assert tokenizer != folder and folder.is_relative_to(tmp_path)
    made = read_json(folder / "pretrain.json")
    assert (made["steps"], made["compute"]) == (2, PRETRAINED_IN)
    assert f"sandbox-{made['key']}" == folder.name
    assert shipped(stages.base().key)
