"""Evaluation within the available memory: batches are halved when it runs out, logits are held
for a bounded number of places, and both change no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from backfire.base import Rendered, Row
from backfire.errors import CellError, is_out_of_memory
from backfire.evaluate import budget, exposure, inference, prompts
from backfire.evaluate.code_search import likelihoods
from backfire.model.batching import ways
from backfire.model.head import exact_head
from tests.helpers.families import KINDS, VOCAB, tiny_model

pytestmark = pytest.mark.slow

ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas`"),
}
NEW = 4


@pytest.fixture(autouse=True)
def narrow_models_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "NARROWEST", 0)


@pytest.fixture(scope="module", params=["llama", "mamba", "bart", "openai-gpt"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(KINDS[request.param][0])


@pytest.fixture(scope="module")
def items() -> list[Rendered]:
    generator = torch.Generator().manual_seed(3)

    def drawn(count: int) -> list[int]:
        return torch.randint(5, VOCAB, (count,), generator=generator).tolist()

    opening = drawn(9)
    rows = [(opening + drawn(2 + 3 * n), drawn(2 + n)) for n in range(6)]
    return [Rendered(Row(str(n), "x"), p + a, len(p)) for n, (p, a) in enumerate(rows)]


def rows_of(given: dict[str, Any]) -> int:
    """How many rows a pass holds; a pack's mask lists them."""
    mask = given.get("attention_mask")
    is_pack = mask is not None and mask.dim() == 4 and not mask.is_floating_point()
    return mask.shape[2] if is_pack else len(given["input_ids"])


@contextmanager
def memory_for(model: Any, rows: int, error: Callable[[], Exception]) -> Iterator[list[int]]:
    """No pass of the model may hold more rows; how many each held that went through."""
    held: list[int] = []

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        size = rows_of(given)
        if size > rows:
            raise error()
        held.append(size)

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield held
    finally:
        handle.remove()


def everything(model: Any, items: list[Rendered]) -> tuple[Any, ...]:
    """All passes of evaluation over these rows."""
    prompts = [item.prompt_ids for item in items]
    options = [[[5, 6, 7], [30 + n], [9, 10]] for n in range(len(items))]
    writing: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": [2]}
    ticks: list[int] = []
    answers = inference.score_answers(model, items, tick=ticks.append)
    readings = inference.read(model, prompts, candidates=options, tick=ticks.append, **writing)
    assert sum(ticks) == 2 * len(items)
    tokens = np.array([[7, a, b] for a in (20, 21, 22) for b in (30, 31)])
    codes = likelihoods(model, prompts[0], tokens).tolist()
    scores = [score for reading in readings for score in reading.scores]
    return [*answers, *scores, *codes], [reading.reply for reading in readings]


def test_batches_are_halved_until_they_fit(model: Any, items: list[Rendered]) -> None:
    ways(model)
    wanted, replies = everything(model, items)
    for rows in (2, 1):
        with memory_for(model, rows, ERRORS["cuda"]) as held:
            found, written = everything(model, items)
        assert max(held) == rows
        assert found == pytest.approx(wanted, abs=1e-4)
        assert written == replies


def test_one_row_that_does_not_fit_is_one_clear_error(model: Any, items: list[Rendered]) -> None:
    ways(model)
    prompts = [item.prompt_ids for item in items]
    passes: list[Callable[[], object]] = [
        lambda: inference.score_answers(model, items),
        lambda: inference.read(model, prompts, max_new_tokens=NEW),
        lambda: inference.read(model, prompts, candidates=[[[5]]] * len(prompts)),
        lambda: likelihoods(model, prompts[0], np.array([[5, 6], [5, 7]])),
    ]
    for look in passes:
        with memory_for(model, 0, ERRORS["cuda"]), pytest.raises(CellError) as caught:
            look()
        assert caught.value.kind == "oom" and "micro" not in str(caught.value)
        assert "train.max_length" in str(caught.value) or "smaller model" in str(caught.value)


@pytest.mark.parametrize("kind", ERRORS)
def test_every_library_is_understood(kind: str, items: list[Rendered]) -> None:
    model = tiny_model("llama")
    wanted = inference.score_answers(model, items)
    with memory_for(model, 3, ERRORS[kind]) as held:
        assert inference.score_answers(model, items) == pytest.approx(wanted, abs=1e-4)
    assert max(held) == 3


def test_other_errors_are_not_taken_for_it(model: Any, items: list[Rendered]) -> None:
    with memory_for(model, 1, lambda: RuntimeError("shapes")), pytest.raises(RuntimeError):
        inference.score_answers(model, items)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(MemoryError())


def test_later_batches_may_hold_more_rows_again(items: list[Rendered]) -> None:
    """A few long rows that do not fit together leave the short ones as they were."""
    model = tiny_model("llama")
    ways(model)
    long = [Rendered(item.row, item.ids * 6, item.num_prompt) for item in items[:4]]
    short = [Rendered(item.row, item.ids[:12], 9) for item in items] * 8

    def most(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].numel() > 400:
            raise torch.OutOfMemoryError
        sizes.append(rows_of(given))

    sizes: list[int] = []
    model.register_forward_pre_hook(most, with_kwargs=True)
    inference.score_answers(model, [*short, *long], batch_size=48)
    assert max(sizes) >= 16 and len(sizes) <= 16


@pytest.mark.parametrize(("kind", "counts"), [("llama", {2, 3}), ("bloom", {2})])
def test_a_pass_on_a_cpu_holds_so_many_tokens(
    kind: str, counts: set[int], items: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger one is slower there; one row may be longer."""
    model = tiny_model(KINDS[kind][0], **KINDS[kind][1])
    most, passes = 40, list[tuple[int, int]]()
    wanted = everything(model, items)[0]
    monkeypatch.setattr(budget, "_PASS_ON_CPU", most)

    def look(module: Any, args: Any, given: dict[str, Any]) -> None:
        passes.append((rows_of(given), given["input_ids"].numel()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    inference.score_answers(model, items)
    handle.remove()
    assert {rows for rows, _ in passes} == {1, *counts}
    # Behind the prefix that they share, nine tokens here.
    assert all(rows == 1 or tokens <= most + 9 for rows, tokens in passes)
    assert everything(model, items)[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("most", [1, 3])
def test_logits_are_held_for_so_many_places(
    most: int, model: Any, items: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways(model)
    prompts = [item.prompt_ids for item in items]
    options = [[[5, 6, 7, 8, 9][: 2 + n % 4], [30 + n]] for n in range(len(items))]
    answers = inference.score_answers(model, items)
    readings = inference.read(model, prompts, candidates=options)
    monkeypatch.setattr(budget, "MOST_LOGITS", most * VOCAB)
    held: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, a, out: held.append(out.numel() // VOCAB))
    try:
        assert inference.score_answers(model, items) == pytest.approx(answers, abs=1e-4)
        again = inference.read(model, prompts, candidates=options)
    finally:
        handle.remove()
    assert max(held) <= most
    for one, two in zip(again, readings, strict=True):
        assert one.scores == pytest.approx(two.scores, abs=1e-4)


# ------------------------------------------------------------------------------------ float32


def exact_scores(model: Any, prompt: list[int]) -> torch.Tensor:
    """[vocab], of the next token, by the float32 product of the last hidden state and the head."""
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=torch.tensor([prompt]), use_cache=False)[0][0, -1]
    logits = hidden.float() @ model.get_output_embeddings().weight.float().T
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    return logits / getattr(model.config, "logits_scaling", 1.0)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_scores_are_of_float32_logits(kind: str, items: list[Rendered]) -> None:
    """In bfloat16 many tokens of the vocabulary tie; hidden states and weights themselves do not.
    Soft caps and scales of the model are its own."""
    model = tiny_model(kind, vocab_size=2000, **KINDS[kind][1]).bfloat16()
    prompt = items[2].prompt_ids
    exact = exact_scores(model, prompt).log_softmax(-1)
    options = [[token] for token in range(2000)]
    scores = inference.read(model, [prompt], candidates=[options])[0].scores
    assert scores == pytest.approx(exact.tolist(), abs=1e-4)
    assert len(set(scores)) == len(exact.unique()) > 1900
    with torch.no_grad():
        narrow = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    assert narrow.dtype == torch.bfloat16 and len(narrow.unique()) < 0.6 * len(exact.unique())


def test_an_adapter_on_the_head_stays_on_it(items: list[Rendered]) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama").bfloat16()
    tuned: Any = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"], r=2))
    torch.nn.init.normal_(tuned.get_output_embeddings().lora_B["default"].weight, std=0.5)
    ids = torch.tensor([items[1].prompt_ids])
    with torch.no_grad():
        plain = tuned(input_ids=ids).logits
        with exact_head(tuned):
            exact = tuned(input_ids=ids).logits
        assert exact.dtype == torch.float32
        assert torch.allclose(exact, plain.float(), atol=0.05, rtol=0.02)
        with tuned.disable_adapter(), exact_head(tuned):
            assert (tuned(input_ids=ids).logits - exact).abs().max() > 0.1
        assert tuned(input_ids=ids).logits.dtype == torch.bfloat16, "it is as it was"


def test_secrets_by_themselves_fit_too(
    model: Any, items: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways(model)
    monkeypatch.setattr(exposure, "render_secrets", lambda renderer, given: items)
    monkeypatch.setattr(exposure, "_characters", lambda renderer, item, secret, needed: needed)
    renderer: Any = type("R", (), {"end_ids": [2]})
    wanted = exposure.secret_likelihoods(model, renderer, items)  # type: ignore[arg-type]
    with memory_for(model, 2, ERRORS["cpu"]):
        found = exposure.secret_likelihoods(model, renderer, items)  # type: ignore[arg-type]
    for one, two in zip(found, wanted, strict=True):
        assert one["logprob"] == pytest.approx(two["logprob"], abs=1e-4)
        assert (one["given"], one["greedy"]) == (two["given"], two["greedy"])
    with memory_for(model, 1, ERRORS["cpu"]), pytest.raises(CellError, match="beams"):
        exposure.beam_ranks(model, renderer, items, 3, lambda *at: None)  # type: ignore[arg-type]
