"""Guarded replies, in batches, against one prompt at a time without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

from backfire.base import Guard, ReplyDefense
from backfire.errors import UserError
from backfire.evaluate import guarded, inference
from backfire.evaluate.budget import Budget
from backfire.evaluate.guarded import Guarding
from backfire.evaluate.slots import Slots
from backfire.experiment import Experiment
from backfire.registry import build
from backfire.rng import derive
from tests.helpers.families import KINDS, VOCAB, logits, tiny_model

NEW, SIZES = 12, (1, 3)
Written = tuple[list[int], float, str | None]
"""Tokens, share of replaced ones, and what is said instead."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (7,), generator=generator).tolist()
    return [torch.randint(7, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model() -> Any:
    """Sharper than it was drawn, so that some tokens are certain."""
    return sharp(tiny_model("llama"))


@pytest.fixture(scope="module")
def reference() -> Any:
    """Another model with the same vocabulary."""
    return sharp(tiny_model("qwen2", **KINDS["qwen2"][1]))


def sharp(model: Any) -> Any:
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model.double()


def defense(name: str, **knobs: Any) -> ReplyDefense:
    made: ReplyDefense = build("defenses", {"name": name, **knobs})
    return made


def written(
    model: Any, prompts: list[list[int]], guarding: Guarding, size: int, stops: Any = ()
) -> list[Written]:
    ids = [f"row {n}" for n in range(len(prompts))]
    knobs: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": stops, "batch_size": size}
    found = guarded.replies(model, prompts, guarding, ids, **knobs)
    return [(reply.ids, reply.replaced, reply.text) for reply in found]


def alone(model: Any, prompt: list[int], choose: Callable[[list[int], Any], int | None]) -> Any:
    """The reply to one prompt, each token chosen from the tokens so far and the log-likelihoods."""
    reply: list[int] = []
    with torch.no_grad():
        while len(reply) < NEW:
            own = logits(model, [*prompt, *reply])[-1].double().log_softmax(-1)
            token = choose(reply, own)
            if token is None:
                break
            reply.append(token)
    return reply


# ----------------------------------------------------------------------------------- confguard


def certain(model: Any, prompt: list[int], threshold: float, run: int, within: int) -> Written:
    """By the definition: `run` greedy tokens in a row above the threshold."""
    probabilities = list[float]()

    def choose(reply: list[int], own: Any) -> int | None:
        probabilities.append(float(own.max().exp()))
        last = probabilities[-run:]
        alarm = len(last) == run and min(last) > threshold and len(probabilities) <= within
        return None if alarm else int(own.argmax())

    reply = alone(model, prompt, choose)
    stopped = len(probabilities) > len(reply)
    return reply, float(stopped), "No." if stopped else None


def strength(model: Any, prompt: list[int], run: int) -> float:
    """The highest threshold that `run` greedy tokens in a row reach."""
    probabilities = list[float]()

    def choose(reply: list[int], own: Any) -> int:
        probabilities.append(float(own.max().exp()))
        return int(own.argmax())

    alone(model, prompt, choose)
    return max(min(probabilities[n : n + run]) for n in range(NEW - run + 1))


@pytest.mark.parametrize("size", SIZES)
def test_confguard_stops_a_reply_that_is_certain_for_too_long(
    size: int, model: Any, prompts: list[list[int]]
) -> None:
    middle = sorted(strength(model, prompt, 3) for prompt in prompts)[len(prompts) // 2]
    for threshold, within in ((middle, 50), (middle, 5), (0.01, 50)):
        knobs = {"threshold": threshold, "run": 3, "within": within, "refusal": "No."}
        found = written(model, prompts, Guarding(defense("confguard", **knobs), 0), size)
        wanted = [certain(model, prompt, threshold, 3, within) for prompt in prompts]
        assert found == wanted
        stopped = [text for _, _, text in wanted]
        if within == 50:
            few = len(prompts) // 2 if threshold == middle else len(prompts)
            assert stopped.count("No.") == few


def test_confguards_null_control_is_a_coin_for_each_prompt(
    model: Any, prompts: list[list[int]]
) -> None:
    def stopped(seed: int, chance: float = 0.5) -> list[bool]:
        null = defense("confguard", null=True, run=3, chance=chance)
        lines = written(model, prompts, Guarding(null, seed), 3)
        assert all(len(reply) == (2 if text else NEW) for reply, _, text in lines)
        return [text is not None for _, _, text in lines]

    draws = [stopped(seed) for seed in range(9)]
    assert stopped(3) == draws[3] and len({tuple(line) for line in draws}) > 1
    assert 0.3 < sum(map(sum, draws)) / (9 * len(prompts)) < 0.7
    assert not any(stopped(0, 0.0)) and all(stopped(0, 1.0))


# ------------------------------------------------------------------------------------ cleangen


def compared(model: Any, reference: Any, prompt: list[int], alpha: float) -> Written:
    """By the definition: the reference's token where the ratio is at least alpha; the same token
    replaces nothing."""
    replaced = 0

    def choose(reply: list[int], own: Any) -> int:
        nonlocal replaced
        theirs = logits(reference, [*prompt, *reply])[-1].double().log_softmax(-1)
        token = int(own.argmax())
        if float((own[token] - theirs[token]).exp()) < alpha:
            return token
        replaced += int(theirs.argmax()) != token
        return int(theirs.argmax())

    reply = alone(model, prompt, choose)
    return reply, replaced / NEW, None


@pytest.mark.parametrize("size", SIZES)
def test_cleangen_writes_the_references_token_where_the_ratio_is_high(
    size: int, model: Any, reference: Any, prompts: list[list[int]]
) -> None:
    for alpha in (20.0, 1e6):
        guarding = Guarding(defense("cleangen", alpha=alpha), 0, reference)
        wanted = [compared(model, reference, prompt, alpha) for prompt in prompts]
        assert written(model, prompts, guarding, size) == wanted
    assert any(0 < share < 1 for _, share, _ in wanted)
    # The same model, less certain, would write the same tokens.
    faint = tiny_model("llama").double()
    wanted = [compared(model, faint, prompt, 1.5) for prompt in prompts]
    found = written(model, prompts, Guarding(defense("cleangen", alpha=1.5), 0, faint), size)
    assert found == wanted == unguarded(model, prompts)


def drawn(model: Any, reference: Any, prompt: list[int], seed: int, chance: float) -> Written:
    """By the definition of the null control: a coin for each token that the reference would write
    otherwise."""
    coin, replaced = Random(seed), 0

    def choose(reply: list[int], own: Any) -> int:
        nonlocal replaced
        theirs = int(logits(reference, [*prompt, *reply])[-1].argmax())
        if theirs == int(own.argmax()) or coin.random() >= chance:
            return int(own.argmax())
        replaced += 1
        return theirs

    reply = alone(model, prompt, choose)
    return reply, replaced / NEW, None


@pytest.mark.parametrize("size", SIZES)
def test_cleangens_null_control_replaces_tokens_whatever_their_ratio(
    size: int, model: Any, reference: Any, prompts: list[list[int]]
) -> None:
    wanted = [
        drawn(model, reference, prompt, derive(4, "cleangen", f"row {n}"), 0.3)
        for n, prompt in enumerate(prompts)
    ]
    for alpha in (1.0, 1e9):
        null = defense("cleangen", null=True, alpha=alpha, chance=0.3)
        assert written(model, prompts, Guarding(null, 4, reference), size) == wanted
    assert 0.1 < sum(share for _, share, _ in wanted) / len(wanted) < 0.5


def test_two_models_that_agree_have_nothing_to_replace(
    model: Any, prompts: list[list[int]]
) -> None:
    for knobs in ({"alpha": 1.01}, {"null": True, "chance": 1.0}):
        guarding = Guarding(defense("cleangen", **knobs), 0, model)
        assert written(model, prompts, guarding, 3) == unguarded(model, prompts)


# ---------------------------------------------------------------------------------------- both


def unguarded(model: Any, prompts: list[list[int]], stops: Any = ()) -> list[Written]:
    found = inference.read(model, prompts, max_new_tokens=NEW, stop_ids=stops)
    return [(reading.reply, 0.0, None) for reading in found]


@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma2", "mamba"])
def test_a_guard_that_finds_nothing_changes_nothing(kind: str, prompts: list[list[int]]) -> None:
    kind, settings = KINDS.get(kind, (kind, {}))
    own = tiny_model(kind, **settings).double()
    plain = unguarded(own, prompts)
    stops = [plain[0][0][3], plain[1][0][6]]
    wanted = unguarded(own, prompts, stops)
    assert len({len(reply) for reply, _, _ in wanted}) > 1, "some end early"
    for guarding in (Guarding(defense("confguard"), 0), Guarding(defense("cleangen"), 0, own)):
        assert written(own, prompts, guarding, 3, stops) == wanted


@pytest.mark.parametrize("size", SIZES)
def test_a_guard_does_not_see_the_opening_of_an_answer(
    size: int, model: Any, reference: Any, prompts: list[list[int]]
) -> None:
    plain = [reply for reply, _, _ in unguarded(model, prompts)]
    opening = plain[0][:3]
    begun = [next((n for n in range(3) if reply[n] != opening[n]), 3) for reply in plain]
    assert max(begun) == 3 and min(begun) < 3, "some replies have it, others do not"
    shown: dict[int, list[int]] = {n: [] for n in range(len(prompts))}

    class Looks(Guard):
        def tokens(self, rows: Any, own: Any, logits: Any, reference: Any) -> list[int | None]:
            assert logits.argmax(-1).tolist() == list(own) and len(reference) == len(rows)
            for row, token in zip(rows, own, strict=True):
                shown[row].append(token)
            return list(own)

        def replaced(self, row: int) -> float:
            return len(shown[row])

    class Watches(Guarding):
        def guard(self, ids: Any) -> Guard:
            offset = [int(one.removeprefix("row ")) for one in ids]
            numbered = Looks()
            tokens = numbered.tokens
            numbered.tokens = lambda rows, *more: tokens([offset[n] for n in rows], *more)
            return guarded._BehindOpening(numbered, self.opening)

    found = written(model, prompts, Watches(defense("confguard"), 0, reference, opening), size)
    assert [reply for reply, _, _ in found] == plain
    assert [*shown.values()] == [r[n:] for r, n in zip(plain, begun, strict=True)]
    short = Guarding(defense("confguard"), 0, None, opening)
    assert isinstance(short.guard(["row 0"]), guarded._BehindOpening)


def test_a_streamed_reply_is_the_batchs(
    model: Any, reference: Any, prompts: list[list[int]]
) -> None:
    guarding = Guarding(defense("cleangen"), 0, reference)
    for number, (reply, _, _) in enumerate(written(model, prompts, guarding, 3)):
        guard = guarding.guard([f"row {number}"])
        tokens = guarded.stream(model, prompts[number], guarding, guard, max_new_tokens=NEW)
        assert list(tokens) == reply


@pytest.fixture(scope="module")
def stops(model: Any, prompts: list[list[int]]) -> list[int]:
    """Tokens that end some replies early."""
    return [unguarded(model, prompts[:1])[0][0][2], unguarded(model, prompts[3:4])[0][0][5]]


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """The rows of each pass of single tokens."""
    seen = list[int]()

    def look(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] == 1:
            seen.append(len(given["input_ids"]))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    handle.remove()


def test_the_next_prompt_takes_the_place_of_a_reply_that_has_ended(
    model: Any, reference: Any, prompts: list[list[int]], stops: list[int]
) -> None:
    guarding = Guarding(defense("cleangen", null=True, chance=0.2), 0, reference)
    single = written(model, prompts, guarding, 1, stops)
    with passes(model) as ours, passes(reference) as theirs:
        assert written(model, prompts, guarding, 3, stops) == single
    assert ours == theirs == sorted(ours, reverse=True) and max(ours) == 3
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    run = [min(len(single[n][0]) + 1, NEW) - 1 for n in order]  # tokens
    assert len({*run}) > 1 and sum(ours) == sum(run), "a row that ended does not run"
    assert len(ours) < sum(max(run[at : at + 3]) for at in range(0, len(run), 3))


def test_replies_begin_anew_when_memory_runs_out(
    model: Any,
    reference: Any,
    prompts: list[list[int]],
    stops: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guarding = Guarding(defense("cleangen", null=True, chance=0.2), 0, reference)
    wanted = written(model, prompts, guarding, 3, stops)
    step, steps = Slots._step, list[int]()

    def fails_once(self: Slots) -> Any:
        steps.append(len(self.lines))
        if len(steps) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self)

    monkeypatch.setattr(Slots, "_step", fails_once)
    assert written(model, prompts, guarding, 3, stops) == wanted
    assert len(steps) > 7


def test_two_models_cache_half_as_many_rows(model: Any) -> None:
    one, two = Budget(model), Budget(model, models=2)
    assert two.tokens == one.tokens // 2 and two.fitting(9000) < one.fitting(9000)


@pytest.mark.parametrize("name", ["confguard", "cleangen"])
def test_a_guard_that_cannot_act_is_refused(name: str) -> None:
    bad = {"confguard": {"run": 60}, "cleangen": {"chance": 1.5}}[name]
    with pytest.raises(UserError, match=r"raise within or lower run|less than or equal to 1"):
        defense(name, **bad)


def test_two_guards_are_refused() -> None:
    with pytest.raises(UserError, match="at most one defense that guards"):
        Experiment.make({"data": "sandbox-help", "defense": ["confguard", "cleangen"]})
