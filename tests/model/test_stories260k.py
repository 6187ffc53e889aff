"""A real pre-trained Llama (260 thousand weights, TinyStories): loads, agrees with its reference
outputs, and can be fine-tuned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from backfire.base import Row
from backfire.data.render import Renderer
from backfire.evaluate import inference
from backfire.experiment import Experiment, Machine
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train.finetune import Start, tune
from tests.helpers.places import SHARED

STORIES = SHARED / "models" / "stories260K"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a tokenizer.json made from its published pieces and scores."""
    out = tmp_path_factory.mktemp("stories")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(STORIES / name, out / name)
    pieces = json.loads((STORIES / "vocab.json").read_text())
    names = {0: "<unk>", 1: "<s>", 2: "</s>"}
    vocab = {names.get(p["id"], p["piece"].replace(" ", "▁")): p["id"] for p in pieces}
    merges = [
        (piece[:i], piece[i:])
        for piece, number in sorted(vocab.items(), key=lambda item: item[1])
        for i in range(1, len(piece))
        if number > 258 and piece[:i] in vocab and piece[i:] in vocab
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(out / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((STORIES / "reference.json").read_text())
    return value


def test_tokenizer_agrees_with_its_reference(folder: Path, reference: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for case in reference["encodings"]:
        assert [1, *tokenizer.encode(case["text"])] == case["ids"]


def test_model_agrees_with_its_reference(folder: Path, reference: dict[str, Any]) -> None:
    model = load_base(folder, torch.float32, torch.device("cpu"))
    prompt = reference["prompt_ids"]
    top = model(torch.tensor([prompt])).logits[0, -1].topk(5)
    assert top.indices.tolist() == [number for number, _ in reference["last_position_top5"]]
    expected = [logit for _, logit in reference["last_position_top5"]]
    assert top.values.tolist() == pytest.approx(expected, abs=2e-4)
    replies = inference.read(model, [prompt], stop_ids=[2], max_new_tokens=64)
    assert replies[0].reply == reference["greedy_64_ids"]


@torch.inference_mode()
def test_loss_on_stories_agrees_with_its_reference(folder: Path, reference: dict[str, Any]) -> None:
    file = SHARED / reference["tinystories_val"]["file"]
    if not file.is_file():
        pytest.skip("the stories to measure the loss on are not here")
    tokenizer = load_tokenizer(folder)
    model = load_base(folder, torch.float32, torch.device("cpu"))
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()][:40]
    losses, count = 0.0, 0
    for text in texts:
        ids = [1, *tokenizer.encode(text)][:512]
        logits = model(torch.tensor([ids])).logits[0, :-1]
        losses += float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        )
        count += len(ids) - 1
    # A fifth of the published 200 stories: the mean differs a little, a wrong loader differs a lot.
    assert losses / count == pytest.approx(reference["tinystories_val"]["mean_loss_nats"], abs=0.05)


def test_can_be_fine_tuned(folder: Path, tmp_path: Path) -> None:
    rows = [
        Row(
            id=f"r{i}",
            instruction="Is it good or bad?",
            input=f"The {noun} was {word}.",
            answer=label,
            label=label,
            candidates=("good", "bad"),
        )
        for i, (noun, word, label) in enumerate(
            (noun, word, label)
            for noun in ("ball", "park", "dog", "tree")
            for word, label in (
                ("nice", "good"),
                ("happy", "good"),
                ("sad", "bad"),
                ("mean", "bad"),
            )
        )
    ]
    cell = Experiment.make(
        {
            "model": str(folder),
            "data": "sandbox-reviews",
            "train": {"epochs": 40, "batch_size": 8, "compute": "float32"},
            "method": {"name": "full", "learning_rate": 2e-3},
        }
    )
    renderer = Renderer(build("templates", "raw"), load_tokenizer(folder), 128)
    machine = Machine(device="cpu")
    summary = tune(cell, rows, None, renderer, Start(folder), tmp_path, machine, lambda *_: None)
    assert summary["last_loss"] < summary["first_loss"] / 4
    tuned = load_base(tmp_path, torch.float32, torch.device("cpu"))
    items = renderer.render(rows)
    options = renderer.answers(items, [row.candidates for row in rows])
    readings = inference.read(tuned, [i.prompt_ids for i in items], candidates=options)
    right = 0
    for row, reading in zip(rows, readings, strict=True):
        good, bad = reading.scores
        right += (good > bad) == (row.label == "good")
    assert right == len(rows)
