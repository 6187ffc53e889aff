"""Every code is as likely as when it is scored alone, and its rank is that of a full list."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.evaluate import exposure as measure
from backfire.evaluate.code_search import CodeTokens, likelihoods
from backfire.registry import build
from backfire.tokenizer import Tokenizer
from tests.helpers.memorization import canary, one_at_a_time, renderer_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["single", "merging"])
@pytest.mark.parametrize("knobs", [{}, {"separator": " ", "answer": "It is {code}, I think."}])
def test_every_code_has_the_likelihood_that_it_has_alone(
    kind: str, knobs: dict[str, Any], exact_model: Any, tokenizer: Tokenizer
) -> None:
    renderer = renderer_of(kind, tokenizer)
    secret = canary(digits=3, **knobs).secrets(0)[0]
    [item] = renderer.render([secret.row])
    spelling, codes = CodeTokens(renderer), [f"{number:03}" for number in range(1000)]
    assert spelling.single == (kind == "single")
    tokens = spelling.all(item, secret)
    plain = renderer.answers([item], [[secret.spelled(code) for code in codes]])[0]
    assert [[t for t in line if t >= 0] for line in tokens.tolist()] == plain
    assert (len({len(line) for line in plain}) == 1) == (kind == "single" or "separator" in knobs)
    counted = list[int]()
    scores = likelihoods(exact_model, item.prompt_ids, tokens, tick=counted.append)
    chosen = random.Random(0).sample(range(1000), 25)
    alone = one_at_a_time(exact_model, item.prompt_ids, [plain[i] for i in chosen])
    assert scores[chosen] == pytest.approx(alone, abs=1e-9)
    assert sum(counted) == 1000 and np.isfinite(scores).all()
    # Leaving out branches that fell behind changes no rank.
    for own in chosen[:3]:
        ahead = likelihoods(exact_model, item.prompt_ids, tokens, floor=scores[own])
        assert ((ahead > scores[own]) == (scores > scores[own])).all()


@pytest.mark.parametrize("kind", ["single", "merging"])
def test_ranks_are_those_of_a_full_list(kind: str, exact_model: Any, tokenizer: Tokenizer) -> None:
    renderer = renderer_of(kind, tokenizer)
    secrets = canary(digits=2, controls=8, each=1, repeats=[1]).secrets(0)
    seen = list[tuple[int, int]]()
    found = measure.ranks(
        exact_model, renderer, secrets, lambda done, total, _: seen.append((done, total))
    )
    for secret, item, rank in zip(
        secrets, renderer.render([s.row for s in secrets]), found, strict=True
    ):
        codes = [f"{number:02}" for number in range(100)]
        every = renderer.answers([item], [[secret.spelled(code) for code in codes]])[0]
        scores = one_at_a_time(exact_model, item.prompt_ids, every)
        assert rank == 1 + sum(s > scores[int(secret.code)] for s in scores)
    assert seen[-1] == (900, 900), "the progress bar ends full"


def test_a_likelihood_covers_the_whole_answer_in_its_context(
    exact_model: Any, tokenizer: Tokenizer
) -> None:
    renderer = renderer_of("single", tokenizer)
    secrets = canary(digits=3).secrets(0)[:3]
    found = measure.secret_likelihoods(exact_model, renderer, secrets, 2)
    for item, entry in zip(renderer.render([s.row for s in secrets]), found, strict=True):
        [logprob] = one_at_a_time(exact_model, item.prompt_ids, [item.answer_ids[:-1]])
        assert entry["logprob"] == pytest.approx(logprob, abs=1e-4)


def test_a_cut_secret_is_an_error(exact_model: Any, tokenizer: Tokenizer) -> None:
    secret = canary(prompt="Tell me, please, as long a story as you can, of {name}").secrets(0)[0]
    with pytest.raises(CellError, match=r"Secret canary-0 is too long; raise train\.max_length"):
        measure.render_secrets(Renderer(build("templates", "raw"), tokenizer, 40), [secret])
