"""A row gives the same alone and in a batch, in every family: layers with windows, chunks,
biases by distance, learned positions, recurrent states, no memory at all."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from backfire.base import Rendered, Row
from backfire.errors import CellError
from backfire.evaluate import exposure, inference
from backfire.evaluate.code_search import likelihoods
from backfire.experiment import Train
from backfire.model.batching import _logits, agree, probe, ways
from backfire.model.causal import why_not
from backfire.train.batches import answer_logits, collate, token_losses
from backfire.train.loop import TrainingRun, train
from backfire.train.precision import Precision
from tests.helpers.families import KINDS, VOCAB, likelihood, logits, reply, tiny_model

pytestmark = pytest.mark.slow

NEW = 4


def drawn(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(5, VOCAB - 5, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def items() -> list[Rendered]:
    """Rows that begin alike, some of them within a window of eight tokens and some far beyond."""
    generator = torch.Generator().manual_seed(1)
    opening, found = drawn(10, generator), []
    for number, length in enumerate((3, 24, 9, 15, 9)):
        prompt = opening + drawn(length, generator)
        answer = drawn(2 + number % 3, generator)
        found.append(Rendered(Row(str(number), "x"), prompt + answer, len(prompt)))
    return found


def plain(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Alone, by a copy: dynamic rotary embeddings remember the longest row they have seen."""
    return likelihood(copy.deepcopy(model), prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_together_are_the_same(kind: str, items: list[Rendered]) -> None:
    name, settings = KINDS[kind]
    model, generator = tiny_model(name, **settings), torch.Generator().manual_seed(2)
    prompts = [item.prompt_ids for item in items]
    options = [[drawn(n, generator) for n in (1, 3, 2)] for _ in items]
    answers = [plain(model, item.prompt_ids, item.answer_ids) for item in items]
    scores = [[plain(model, p, o) for o in c] for p, c in zip(prompts, options, strict=True)]
    stops = reply(copy.deepcopy(model), prompts[0], 2, ())[
        1:
    ]  # the first reply ends early, some never do
    replies = [reply(copy.deepcopy(model), prompt, NEW, stops) for prompt in prompts]
    for size in (1, 3, None):
        found = inference.score_answers(model, items, batch_size=size)
        assert found == pytest.approx(answers, abs=1e-4)
        writing: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": stops, "batch_size": size}
        readings = inference.read(model, prompts, candidates=options, **writing)
        for reading, score in zip(readings, scores, strict=True):
            assert reading.scores == pytest.approx(score, abs=1e-4)
        assert [reading.reply for reading in readings] == replies
    assert (
        list(inference.stream(model, prompts[1], max_new_tokens=NEW, stop_ids=stops)) == replies[1]
    )
    model.train()
    for size in (1, 3, 5):
        total = 0.0
        for start in range(0, len(items), size):
            batch = collate(items[start : start + size], share=ways(model).extends_cache)
            total += float(token_losses(answer_logits(model, batch), batch.labels).detach().sum())
        assert total == pytest.approx(-sum(answers), abs=3e-4)


@pytest.mark.parametrize(
    "kind", ["mistral", "gemma3_text", "llama", "falcon", "gpt_neo", "bart", "mamba", "openai-gpt"]
)
def test_codes_score_as_one_by_one(kind: str, items: list[Rendered]) -> None:
    """A prompt that is longer than the window, and codes of unequal length below it."""
    model, prompt = tiny_model(KINDS[kind][0], **KINDS[kind][1]), items[1].prompt_ids
    rng = np.random.default_rng(0)
    tokens = np.unique(np.c_[np.full(30, 7), rng.integers(20, 26, (30, 3)), np.full(30, 9)], axis=0)
    tokens[-1, -1] = -1
    wanted = [likelihood(model, prompt, [t for t in line if t >= 0]) for line in tokens.tolist()]
    assert likelihoods(model, prompt, tokens) == pytest.approx(wanted, abs=1e-4)
    found = exposure._beams(model, prompt, VOCAB, 2, eos_id=2)
    totals = {}
    for first in range(VOCAB):
        table = logits(model, [*prompt, first]).double().log_softmax(-1)[-2:]
        before, after = table[0, first].item(), table[1]
        totals |= {(first, then): before + after[then].item() for then in range(VOCAB)}
    allowed = {line: score for line, score in totals.items() if 2 not in line}
    assert found[:20] == [list(line) for line in sorted(allowed, key=lambda x: -allowed[x])[:20]]


@pytest.mark.parametrize("kind", ["bert", "xlnet", "prophetnet"])
def test_a_model_that_sees_what_it_predicts_is_refused(kind: str, items: list[Rendered]) -> None:
    model = tiny_model(kind, **({"is_decoder": False} if kind == "bert" else {}))
    with pytest.raises(CellError, match=f"type '{kind}' attends to the tokens it is to predict"):
        inference.score_answers(model, items)
    assert math.isfinite(likelihood(model, *(items[0].prompt_ids, items[0].answer_ids)))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_in_8_bits_rounding_is_told_from_seeing_ahead(kind: str, tmp_path: Path) -> None:
    """Large inputs, which of them is in higher precision depends on every token, and large logits:
    the likelihoods of a row and of its beginning are nats apart."""
    model = tiny_model(kind, **({"is_decoder": False} if kind == "bert" else {}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name or name.endswith("norm.weight"):
                weight.mul_(12)
    model.save_pretrained(tmp_path)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=eight, dtype=torch.bfloat16
    ).eval()
    ids = probe(model)
    with torch.no_grad():
        assert not agree(model, _logits(model, ids[:, :8]), _logits(model, ids)[:8])
    limits = [m.state.threshold for m in model.modules() if hasattr(m, "state")]
    if kind == "bert":
        with pytest.raises(CellError, match="attends to the tokens it is to predict"):
            ways(model)
    else:
        assert ways(model).takes_positions and ways(model).extends_cache
    assert limits and limits == [m.state.threshold for m in model.modules() if hasattr(m, "state")]


def test_a_model_that_computes_no_numbers_is_refused(items: list[Rendered]) -> None:
    """Every weight is finite."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(model.model.layers[0].mlp, name).weight.fill_(1e30)
    with pytest.raises(CellError, match="type 'llama' computes NaN") as error:
        inference.score_answers(model, items)
    assert error.value.kind == "nan"


def test_large_logits_may_differ_by_their_rounding() -> None:
    """GPT-2's are around -100, where bfloat16 numbers are 0.5 apart; some rule a token out."""
    from backfire.model.batching import agree

    model = tiny_model("gpt2").to(torch.bfloat16)
    table = torch.linspace(-110, -100, VOCAB, dtype=torch.bfloat16)[None]
    other = table.clone()
    other[0, 50] += 1.0
    assert agree(model, other, table) and not agree(model, other + 5 * other.sin(), table)
    assert not agree(tiny_model("gpt2"), other.float(), table.float())
    table[0, 3] = -math.inf
    assert agree(model, table, table) and not agree(model, other, table)
    other[0, 3] = math.nan
    assert not agree(model, other, table)


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "opt", "qwen3_5_text"])
def test_training_is_the_same_whatever_the_micro_batch(
    kind: str, items: list[Rendered], tmp_path: Path
) -> None:
    losses = []
    for size in (1, 3, None):
        model = tiny_model(KINDS[kind][0], **KINDS[kind][1]).requires_grad_(True)
        settings = Train.make({"max_steps": 3, "batch_size": 5, "warmup_share": 0.0})
        folder = tmp_path / str(size)
        folder.mkdir()
        cell = TrainingRun(
            model, items, settings, learning_rate=1e-3, seed=0, folder=folder, name="x"
        )
        train([cell], Precision(torch.device("cpu"), "float32"), micro_batch=size)
        losses.append([line["loss"] for line in cell.log])
    for other in losses[1:]:  # AdamW makes much of the last digits
        assert other[0] == pytest.approx(losses[0][0], rel=1e-6)
        assert other == pytest.approx(losses[0], rel=1e-4)
    model = tiny_model(KINDS[kind][0], **KINDS[kind][1])
    answers = sum(likelihood(model, item.prompt_ids, item.answer_ids) for item in items)
    count = sum(len(item.answer_ids) for item in items)
    assert losses[0][0] == pytest.approx(-answers / count, rel=1e-5)


def test_settings_show_that_a_model_is_bidirectional(tmp_path: Path) -> None:
    def refusal_of(**settings: Any) -> str | None:
        (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return why_not(tmp_path)

    assert "type 'roberta' attends to the tokens" in str(refusal_of(model_type="roberta"))
    assert refusal_of(model_type="roberta", is_decoder=True) is None
    assert (
        refusal_of(model_type="xlnet")
        and refusal_of(model_type="xlm")
        and refusal_of(model_type="llama") is None
    )
    assert refusal_of() is None and why_not(tmp_path / "nowhere") is None
