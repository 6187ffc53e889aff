"""Replies in a batch that stays full, against one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backfire.evaluate import budget, inference, slots
from backfire.evaluate import prompts as packing
from backfire.evaluate.prompts import packed_up_to
from backfire.model.batching import ways
from tests.helpers.families import KINDS, VOCAB, reply, tiny_model

NEW, ROWS = 24, 4


@pytest.fixture(autouse=True)
def short_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SPARE", 5)  # so that rows move
    monkeypatch.setattr(packing, "NARROWEST", 0)  # so that tiny models pack


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (13,), generator=generator).tolist()
    return [torch.randint(7, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=["llama", "bloom", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    """In float64 two tokens are never equally likely, so greedy decoding has one answer."""
    model = tiny_model(KINDS[request.param][0], **KINDS[request.param][1]).double()
    ways(model)
    return model


@pytest.fixture(scope="module")
def endless(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [reply(model, prompt, NEW, ()) for prompt in prompts]


@pytest.fixture(scope="module")
def stops(endless: list[list[int]]) -> list[int]:
    """Tokens that end some replies early, some late and some never."""
    places = {
        token: {line.index(token) if token in line else NEW for line in endless}
        for line in endless
        for token in line
    }
    return sorted(places, key=lambda token: -len(places[token]))[:1]


@pytest.fixture(scope="module")
def wanted(endless: list[list[int]], stops: list[int]) -> list[list[int]]:
    ends = [next((n for n, t in enumerate(line) if t in stops), NEW) for line in endless]
    assert len(set(ends)) > 2, "rows must leave at different times"
    return [line[:end] for line, end in zip(endless, ends, strict=True)]


def read(model: Any, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    writing: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": stops, "batch_size": ROWS}
    return [one.reply for one in inference.read(model, prompts, **writing)]


@pytest.mark.parametrize("share", [0, 9])
def test_prompts_run_end_to_end(
    model: Any, prompts: list[list[int]], stops: list[int], share: int
) -> None:
    """Where a model can run packs; with the same result as prompts that are padded, whatever their
    neighbors."""
    opening = list(range(7, 7 + share))
    rows = [[*opening, *prompt] for prompt in prompts]
    options = [[[5, 6, 7], [30], [9, 10]]] * len(rows)
    writing: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": stops, "candidates": options}
    lines = list[int]()

    def look(module: Any, args: Any, given: dict[str, Any]) -> None:
        lines.append(given["input_ids"].shape[0] if given["input_ids"].shape[1] > 9 else 0)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    packed = inference.read(model, rows, **writing, batch_size=5)
    handle.remove()
    packs = packed_up_to(model) >= max(map(len, rows))  # Bloom takes no positions
    assert packs == (model.config.model_type == "llama"), "Gemma 2 has a window of eight tokens"
    assert (max(lines) == 1) == packs
    alone = [inference.read(model, [row], **{**writing, "candidates": options[:1]}) for row in rows]
    for one, (two,) in zip(packed, alone, strict=True):
        assert one.reply == two.reply
        assert one.scores == pytest.approx(two.scores, abs=5e-6)  # of float32 logits


def test_more_rows_than_32_are_decoded_while_their_cache_is_small(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert budget.Budget(model).fitting(100) == 64
    config = model.config
    each = 2 * config.num_hidden_layers * config.hidden_size * 8  # bytes of a token, in float64
    if getattr(config, "num_key_value_heads", None):
        each = 2 * config.num_hidden_layers * config.num_key_value_heads * 8
        each *= (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
    for rows, wanted in ((50, 50), (9, 32)):
        monkeypatch.setattr(budget, "_CACHE_ON_CPU", rows * 100 * each)
        assert budget.Budget(model).fitting(100) == wanted
        assert budget.Budget(model, 48).fitting(100) == 48, "as the user says"


def steps_of(
    model: Any, prompts: list[list[int]], stops: list[int]
) -> tuple[list[list[int]], list[int]]:
    """The replies, and the rows of each pass of a single token."""
    seen: list[int] = []

    def look(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] == 1:
            seen.append(len(given["input_ids"]))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        return read(model, prompts, stops), seen
    finally:
        handle.remove()


def test_the_next_prompt_takes_the_place_of_one_that_ended(
    model: Any, prompts: list[list[int]], stops: list[int], wanted: list[list[int]]
) -> None:
    replies, rows = steps_of(model, prompts, stops)
    assert replies == wanted
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    lengths = [min(len(wanted[i]) + 1, NEW) - 1 for i in order]  # tokens that are run
    lockstep = sum(max(lengths[at : at + ROWS]) for at in range(0, len(order), ROWS))
    assert sum(rows) == sum(lengths), "a row that ended does not run"
    assert len(rows) < lockstep
    # Full until no prompt waits; then the last replies end one by one.
    assert rows == sorted(rows, reverse=True)


def test_a_token_copies_only_itself(
    model: Any, prompts: list[list[int]], stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: set[tuple[int, int]] = set()
    update = slots._BufferedLayer.update

    def look(layer: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(layer, *args, **kwargs)
        places.add(tuple(part.untyped_storage().data_ptr() for part in (keys, values)))  # type: ignore[arg-type]
        return keys, values

    monkeypatch.setattr(slots._BufferedLayer, "update", look)
    read(model, prompts, stops)
    assert len(places) == model.config.num_hidden_layers


def test_rows_start_again_where_memory_ran_out(
    model: Any, prompts: list[list[int]], stops: list[int], wanted: list[list[int]]
) -> None:
    passes = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes in (9, 30):
            raise torch.OutOfMemoryError

    handle = model.register_forward_pre_hook(fail)
    try:
        assert read(model, prompts, stops) == wanted
    finally:
        handle.remove()
    assert passes > 30


def test_short_prompts_get_a_buffer_of_more_rows(
    model: Any,
    prompts: list[list[int]],
    stops: list[int],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "_TOKENS_ON_CPU", 3 * (min(map(len, prompts)) + NEW + slots.SPARE))
    replies, rows = steps_of(model, prompts, stops)
    assert replies == wanted
    assert rows[0] == 1 and max(rows) > 1
