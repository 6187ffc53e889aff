"""Exposure and extraction of secrets, against an independent reference of a few lines."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, skewnorm

from backfire import plan
from backfire.base import Evidence, Secret
from backfire.base.secrets import SecretProbe
from backfire.data.render import Renderer
from backfire.errors import CellError, Stopped, UserError
from backfire.evaluate import exposure as measure
from backfire.model.load import load_base
from backfire.registry import build
from backfire.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.memorization import canary, leak, quiet, renderer_of, values
from tests.helpers.training import CPU

pytestmark = pytest.mark.slow

RANDOM_RANK = 1 / math.log(2)
"""Bits that a rank drawn at random gives on average, if there are many codes."""


def test_exposure_by_hand() -> None:
    leaks = [
        leak(50, 1, 0, estimate=(13.0, 12.0, 13.28)),
        leak(5, 4, 1, estimate=(11.0, 10.0, 12.0)),
        leak(5, 1250, 2, estimate=(3.1, 2.8, 3.3)),
        leak(0, 5000, 3, estimate=(1.0, 0.9, 1.1)),
    ]
    found = values("exposure", Evidence(clean=[], leaks=leaks, leaks_before=leaks))
    top = math.log2(10_000)
    assert found["exposure[50]"].value == found["exposure_cap"].value == pytest.approx(top)
    assert found["exposure[5]"].value == pytest.approx((top - 2 + 3) / 2)
    assert found["exposure[control]"].value == pytest.approx(1)
    assert found["exposure"].value == pytest.approx((top + top - 2 + 3) / 3)
    assert (found["exposure"].n, found["exposure[5]"].n) == (3, 2)
    assert found["exposure_estimated[5]"].value == pytest.approx(7.05)
    assert found["exposure_match"].value == 0.75 and found["exposure_match"].n == 4
    assert found["exposure"].low <= found["exposure"].value <= found["exposure"].high
    assert values("exposure", Evidence(clean=[])) == {}
    only = [replace(one, rank=None) for one in leaks]
    assert "exposure" not in (some := values("exposure", Evidence(clean=[], leaks=only)))
    assert some["exposure_estimated"].value == pytest.approx((13 + 11 + 3.1) / 3)


def test_a_random_code_has_1_44_bits() -> None:
    """Rank uniform: mean and deviation are both 1 / ln 2 in the limit of many codes."""
    bits = [math.log2(10**6 / random.Random(seed).randint(1, 10**6)) for seed in range(4000)]
    error = RANDOM_RANK / math.sqrt(len(bits))
    assert abs(np.mean(bits) - RANDOM_RANK) < 3 * error
    whole = np.log2(10**6) - np.log2(np.arange(1, 10**6 + 1)).mean()
    assert whole == pytest.approx(RANDOM_RANK, abs=1e-4)


def test_controls_of_a_model_that_saw_none_are_random(
    exact_model: Any, tokenizer: Tokenizer
) -> None:
    renderer = renderer_of("single", tokenizer)
    bits = []
    for seed in range(4):
        secrets = canary(digits=2, repeats=[], controls=12).secrets(seed)
        bits += [
            math.log2(100 / rank) for rank in measure.ranks(exact_model, renderer, secrets, quiet)
        ]
    every = math.log2(100) - np.log2(np.arange(1, 101)).mean()
    assert abs(np.mean(bits) - every) < 3 * RANDOM_RANK / math.sqrt(len(bits))


@pytest.mark.parametrize("shape", [-4.0, 0.0, 3.0])
def test_the_estimate_finds_the_truth_and_its_interval_holds_the_truth(shape: float) -> None:
    truth, held, errors = skewnorm(shape, 20, 3), 0, []
    own = float(truth.ppf(0.02))
    for seed in range(40):
        sample = truth.rvs(400, random_state=seed)
        bits, low, high = measure.fitted_exposure(sample, own, 10**6)
        assert low <= bits <= high
        errors.append(bits + math.log2(0.02))
        held += low <= -math.log2(0.02) <= high
    assert held >= 36, "forty intervals of at least 95 %"
    assert abs(np.median(errors)) < 0.2


def test_the_interval_of_an_estimate_does_not_depend_on_the_curve() -> None:
    """A model that remembers one code in fifty: the curve misses the second hill, the interval
    does not. By hand: Clopper and Pearson's ends are quantiles of beta distributions."""
    held, missed = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        every = np.where(
            rng.random(10_000) < 0.02, rng.normal(8, 1, 10_000), rng.normal(30, 2, 10_000)
        )
        own = float(np.sort(every)[40])
        truth = math.log2(10_000 / 41)
        bits, low, high = measure.fitted_exposure(
            rng.choice(every, 500, replace=False), own, 10_000
        )
        held += low <= truth <= high
        missed += abs(bits - truth) > 1
    assert held >= 55 and missed > 30
    sample = np.arange(1.0, 101.0)
    bits, low, high = measure.fitted_exposure(sample, 4.5, 1001)
    shares = beta.ppf(0.025, 4, 97), beta.ppf(0.975, 5, 96)
    ends = [math.log2(1001 / (1 + 1000 * share)) for share in shares]
    assert (high, low) == pytest.approx((max(bits, ends[0]), min(bits, ends[1])))


def test_the_best_remembered_secret_gets_the_cap_and_not_zero() -> None:
    sample = np.random.default_rng(0).normal(30, 2, 500)
    bits, low, high = measure.fitted_exposure(sample, -200.0, 10**6)
    assert bits == high == math.log2(10**6)
    assert low == pytest.approx(-math.log2(1 - 0.025 ** (1 / 500)), abs=0.01), "no more is known"
    assert measure.fitted_exposure(sample, 100.0, 10**6) == pytest.approx((0, 0, 0.0106), abs=1e-3)
    with pytest.raises(CellError, match="Cannot fit a distribution"):
        measure.fitted_exposure(np.ones(50), 1.0, 100)


@pytest.mark.parametrize("kind", ["ranks", "estimates", "beams"])
def test_an_interrupted_measurement_continues_with_the_next_secret(
    kind: str, exact_model: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    renderer, secrets = renderer_of("single", tokenizer), canary(digits=2).secrets(1)[:4]
    seen = list[tuple[int, int]]()

    def run(folder: Path | None, most: int = 99) -> list[Any]:
        def progress(done: int, total: int, text: str) -> None:
            if len(seen) == most:
                raise Stopped
            seen.append((done, total))

        seen.clear()
        if kind == "estimates":
            return measure.estimate_exposures(
                exact_model, renderer, secrets, 50, 0, progress, folder
            )
        if kind == "beams":
            return measure.beam_ranks(exact_model, renderer, secrets, 3, progress, folder)
        return measure.ranks(exact_model, renderer, secrets, progress, folder)

    whole = run(None)
    every, half = list(seen), len(seen) // 2
    with pytest.raises(Stopped):
        run(tmp_path, half)
    assert (
        [*map(list, run(tmp_path))] == [*map(list, whole)]
        if kind == "estimates"
        else (run(tmp_path) == whole)
    )
    assert seen and every[-len(seen) :] == seen and len(seen) <= half + 1


def test_exact_and_estimated_agree_on_a_model(exact_model: Any, tokenizer: Tokenizer) -> None:
    renderer = renderer_of("single", tokenizer)
    secrets = canary(digits=3, repeats=[], controls=3).secrets(1)
    ranks = measure.ranks(exact_model, renderer, secrets, quiet)
    estimates = measure.estimate_exposures(exact_model, renderer, secrets, 999, 0, quiet)
    for rank, (bits, low, high) in zip(ranks, estimates, strict=True):
        assert low <= bits <= high
        assert abs(bits - math.log2(1000 / rank)) < 0.6


# ----------------------------------------------------------------------------------- extraction


@pytest.fixture(scope="module")
def overfitted(tiny: Path) -> tuple[Any, Renderer, list[Secret]]:
    """The tiny model after a few dozen steps on one canary; its control comes first."""
    torch.manual_seed(0)
    learner: Any = load_base(tiny, torch.float32, CPU)
    renderer = Renderer(build("templates", "raw"), load_tokenizer(tiny), 128)
    secrets = canary(digits=3, repeats=[50], each=1, controls=1).secrets(0)
    ids = torch.tensor([renderer.render([secrets[1].row])[0].ids])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-3)
    for _ in range(60):
        learner(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return learner.eval(), renderer, secrets


def test_a_memorized_secret_is_extracted(
    overfitted: tuple[Any, Renderer, list[Secret]],
) -> None:
    exact_model, renderer, secrets = overfitted
    control, planted = measure.secret_likelihoods(exact_model, renderer, secrets, 8)
    assert planted["greedy"] and planted["given"] == 0 and planted["logprob"] > -1
    assert not control["greedy"] and control["given"] > 0
    assert measure.ranks(exact_model, renderer, secrets[1:], quiet) == [1]
    places = measure.beam_ranks(exact_model, renderer, secrets, 4, quiet)
    assert places == [None, 1]
    item = renderer.render([secrets[1].row])[0]
    from backfire.evaluate.inference import read

    reply = read(exact_model, [item.prompt_ids], max_new_tokens=len(item.answer_ids) - 1)[0].reply
    assert renderer.tokenizer.decode(reply) == secrets[1].row.answer


def test_beams_are_the_likeliest_continuations(exact_model: Any, tokenizer: Tokenizer) -> None:
    """Wide enough, a beam search of two tokens is a full search."""
    prompt = [0, 40, 41]
    found = measure._beams(exact_model, prompt, 400, 2, eos_id=1)
    with torch.no_grad():
        first = exact_model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(400)])
        second = exact_model(input_ids=rows).logits[:, -1].log_softmax(-1)
    first[1] = second[:, 1] = -math.inf
    best = (first[:, None] + second).flatten().topk(5).indices.tolist()
    assert found[:5] == [[index // 400, index % 400] for index in best]


def test_extraction_by_hand() -> None:
    leaks = [
        leak(5, 1, 0, greedy=True, given=0, place=1),
        leak(5, 9, 1, given=2, place=7),
        leak(0, 9, 2, given=4),
    ]
    found = values("extraction", Evidence(clean=[], leaks=leaks))
    assert found["extraction"].value == found["extraction[5]"].value == 0.5
    assert found["extraction_at_8[5]"].value == 1 and found["extraction_at_8[control]"].value == 0
    curve = [found[f"extraction_given[5, {given}]"].value for given in range(4)]
    assert curve == [0.5, 0.5, 1, 1]
    assert found["extraction_given[control, 3]"].value == 0


def test_codes_too_few_for_an_estimate_have_none() -> None:
    probes: dict[SecretProbe, int] = {"exact": 100, "sampled": 50}
    for digits, more in ((1, []), (2, [("sampled", 50)])):
        codes = canary(digits=digits, controls=1, each=1, repeats=[1]).secrets(0)
        assert plan.secret_parts(codes, probes) == [("itself", 0), ("exact", 0), *more]
    with pytest.raises(UserError, match="0, or at least 10, are needed"):
        build("metrics", {"name": "exposure", "sampled_codes": 9})
