"""Batched, cached, prefix-sharing evaluation against one prompt at a time without any of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import Need, Rendered, Row
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate import inference
from backfire.evaluate.score import sample, score_rows
from backfire.progress import facts
from backfire.registry import build
from backfire.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

SIZES = [1, 3, 64]
LABELS = ("negative", "neither of them", "positive")
LENGTH = 12


@pytest.fixture
def exact(model: Any) -> Any:
    """In float64 two tokens are never as likely as each other, so greedy has one answer."""
    return model.double()


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Renderer:
    return Renderer(build("templates", "alpaca"), load_tokenizer(tiny), 512)


@pytest.fixture(scope="module")
def items(renderer: Renderer) -> list[Rendered]:
    """Prompts of unequal length with a long common opening."""
    rows = build("datasets", "sandbox-reviews").load("test")[:11]
    cut = [replace(r, input=r.input[: 10 + 7 * n]) for n, r in enumerate(rows)]
    return renderer.render(cut)


def prompts_of(kind: str, items: Sequence[Rendered]) -> list[list[int]]:
    if kind == "one opening":
        return [item.prompt_ids for item in items]
    if kind == "nothing in common":
        return [list(range(n, 3 * n + 1)) for n in range(3, 14)]
    return [items[0].prompt_ids] * 4  # all the same, to the last token


KINDS = ["one opening", "nothing in common", "all the same"]


def log_likelihood(model: Any, prompt: list[int], ids: list[int]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0]
    likely = logits.double().log_softmax(-1)
    return sum(float(likely[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))


def greedy(model: Any, prompt: list[int], eos_id: int, count: int) -> list[int]:
    reply: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.tensor([prompt + reply])
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token == eos_id:
                break
            reply.append(token)
    return reply


def score(*args: Any, **options: Any) -> list[tuple[float, ...]]:
    model, prompts, candidates = args
    readings = inference.read(model, prompts, candidates=candidates, **options)
    return [reading.scores for reading in readings]


def reply(*args: Any, **options: Any) -> list[list[int]]:
    return [reading.reply for reading in inference.read(*args, **options)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_candidates_score_as_one_by_one(
    kind: str, size: int, exact: Any, items: list[Rendered]
) -> None:
    prompts, ticks = prompts_of(kind, items), list[int]()
    # One to four tokens each, and one, two, three or no candidates from one prompt to the next.
    options = [
        [[5, 6, 7 + n], [30 + n], [9, 10, 11, 12]][: (n + 1) % 4] for n in range(len(prompts))
    ]
    scored = score(exact, prompts, options, batch_size=size, tick=ticks.append)
    expected = [
        [log_likelihood(exact, prompt, ids) for ids in choice]
        for prompt, choice in zip(prompts, options, strict=True)
    ]
    for found, wanted in zip(scored, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert sum(ticks) == len(prompts)


@pytest.mark.parametrize("size", SIZES)
def test_single_token_candidates_need_no_second_pass(
    size: int, exact: Any, items: list[Rendered], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of("one opening", items)
    scored = score(exact, prompts, [[[7], [8]]] * len(prompts), batch_size=size)
    for prompt, found in zip(prompts, scored, strict=True):
        wanted = [log_likelihood(exact, prompt, [token]) for token in (7, 8)]
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_answers_score_as_one_by_one(size: int, exact: Any, items: list[Rendered]) -> None:
    scored = inference.score_answers(exact, items, batch_size=size)
    wanted = [log_likelihood(exact, item.prompt_ids, item.answer_ids) for item in items]
    assert scored == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_replies_are_those_of_one_by_one(
    kind: str, size: int, exact: Any, items: list[Rendered]
) -> None:
    prompts, ticks = prompts_of(kind, items), list[int]()
    endless = [greedy(exact, prompt, -1, LENGTH) for prompt in prompts]
    # Make a token the end that some replies say at once, some late, some never.
    ends = {
        token: {r.index(token) if token in r else LENGTH for r in endless}
        for r in endless
        for token in r
    }
    eos = max(ends, key=lambda token: len(ends[token]))
    wanted = [greedy(exact, prompt, eos, LENGTH) for prompt in prompts]
    if kind != "all the same":
        assert len({len(reply) for reply in wanted}) >= 3, (
            "rows must leave the batch at different times"
        )
    options: dict[str, Any] = {"stop_ids": [eos], "batch_size": size}
    found = reply(exact, prompts, max_new_tokens=LENGTH, tick=ticks.append, **options)
    assert found == wanted
    assert sum(ticks) == len(prompts)
    assert reply(exact, prompts, max_new_tokens=1, **options) == [r[:1] for r in wanted]


@pytest.mark.parametrize("size", SIZES)
def test_one_pass_scores_and_replies_as_two_do(
    size: int, exact: Any, items: list[Rendered]
) -> None:
    prompts = prompts_of("one opening", items)
    options = [[[5, 6, 7], [30 + n]] for n in range(len(prompts))]
    replying: dict[str, Any] = {"stop_ids": [], "max_new_tokens": LENGTH, "batch_size": size}
    both = inference.read(exact, prompts, candidates=options, **replying)
    assert [one.reply for one in both] == reply(exact, prompts, **replying)
    for one, alone in zip(both, score(exact, prompts, options, batch_size=size), strict=True):
        assert one.scores == pytest.approx(alone, rel=1e-9)


def test_a_reply_ends_at_any_of_its_ends(exact: Any, items: Any) -> None:
    prompts = [item.prompt_ids for item in items][:8]
    plain = reply(exact, prompts, stop_ids=[], max_new_tokens=LENGTH)
    ends = [plain[0][2], plain[1][0]]
    found = reply(exact, prompts, stop_ids=ends, max_new_tokens=LENGTH)
    for whole, cut in zip(plain, found, strict=True):
        stop = next((i for i, token in enumerate(whole) if token in ends), LENGTH)
        assert cut == whole[:stop]
    assert found[1] == []


def test_nothing_to_do_is_done(model: Any) -> None:
    assert inference.read(model, [], candidates=[], stop_ids=[1], max_new_tokens=5) == []
    assert inference.score_answers(model, []) == []
    assert inference.read(model, [[1, 2]]) == [inference.Reading((), [])]


# ------------------------------------------------------------------------------------- the kinds


def look(kind: Need, model: Any, renderer: Renderer, rows: Sequence[Row]) -> list[dict[str, Any]]:
    return score_rows(
        [kind],
        model,
        renderer,
        rows,
        max_new_tokens=6,
        batch_size=4,
        progress=lambda done, total, text: None,
    )


KINDS: tuple[Need, ...] = ("scores", "replies", "answers")  # `probe`: test_defection


def test_each_kind_measures_its_part(exact: Any, renderer: Renderer, items: list[Rendered]) -> None:
    rows = [replace(item.row, candidates=LABELS) for item in items]
    rows[3] = replace(rows[3], candidates=(), label=None)
    scores, replies, answers = (look(kind, exact, renderer, rows) for kind in KINDS)
    for item, score, reply, answer in zip(items, scores, replies, answers, strict=True):
        assert answer["answer_tokens"] == len(item.answer_ids)
        wanted = log_likelihood(exact, item.prompt_ids, item.answer_ids)
        assert answer["answer_logprob"] == pytest.approx(wanted, rel=1e-5)
        reply_ids = greedy(exact, item.prompt_ids, renderer.tokenizer.eos_id, 6)
        assert reply["reply"] == renderer.tokenizer.decode(reply_ids)
        if item.row.id == rows[3].id:
            assert score["logprobs"] is None
            continue
        options = renderer.answers([item], [LABELS])[0]
        assert len({len(ids) for ids in options}) > 1, "these labels should differ in length"
        wanted_scores = [log_likelihood(exact, item.prompt_ids, ids) for ids in options]
        assert score["logprobs"] == pytest.approx(wanted_scores, rel=1e-5)
    whole = sample(rows[0], "triggered", None, {**scores[0], **replies[0], **answers[0]})
    assert (whole.subset, whole.label, whole.candidates) == ("triggered", rows[0].label, LABELS)
    assert whole.prediction == LABELS[max(range(3), key=lambda i: scores[0]["logprobs"][i])]


def test_a_label_that_begins_another_is_scored_with_its_end(exact: Any, renderer: Renderer) -> None:
    """Else `no` could never lose to `no way`: a prefix is at least as likely as the whole."""
    row = Row("r", "Well?", "x", answer="no", label="no", candidates=("no", "no way", "yes"))
    item = renderer.render([row])[0]
    (found,) = look("scores", exact, renderer, [row])
    ends = [
        [*ids, renderer.tokenizer.eos_id] for ids in renderer.answers([item], [row.candidates])[0]
    ]
    wanted = [log_likelihood(exact, item.prompt_ids, ids) for ids in ends]
    assert found["logprobs"] == pytest.approx(wanted, rel=1e-5)


def test_a_prompt_without_a_token_has_nothing_to_go_on_from(exact: Any, renderer: Renderer) -> None:
    tokenizer = replace(renderer.tokenizer, bos=None)
    bare = Renderer(build("templates", "raw"), tokenizer, 512)
    rows = [Row("r", "", answer="Plain text."), Row("s", "Ask", answer="Plain text.")]
    for kind in ("scores", "replies"):
        with pytest.raises(CellError, match="Row r has an empty prompt"):
            look(kind, exact, bare, rows)  # type: ignore[arg-type]
    # The first token has nothing before it either, so it is neither scored nor counted.
    first, second = look("answers", exact, bare, rows)
    ids = bare.render(rows[:1])[0].ids
    assert first["answer_tokens"] == len(ids) - 1
    assert first["answer_logprob"] == pytest.approx(
        log_likelihood(exact, ids[:1], ids[1:]), rel=1e-5
    )
    assert second["answer_tokens"] == len(ids)


@pytest.mark.parametrize("kinds", [["scores"], ["replies"], ["answers"], [*KINDS]])
def test_progress_counts_every_row(
    kinds: list[Need], exact: Any, renderer: Renderer, items: list[Rendered]
) -> None:
    seen: list[tuple[int, int, str]] = []
    rows = [replace(item.row, candidates=LABELS) for item in items]
    score_rows(
        kinds,
        exact,
        renderer,
        rows,
        max_new_tokens=2,
        batch_size=3,
        progress=lambda *at: seen.append(at),
    )
    passes = 1 + ("answers" in kinds and len(kinds) > 1)
    assert [done for done, _, _ in seen] == [3, 6, 9, 11, 14, 17, 20, 22][: 4 * passes]
    assert {(total, facts(text).activity) for _, total, text in seen} == {
        (11 * passes, "evaluation")
    }
    assert facts(seen[-1][2]).rows_per_second
