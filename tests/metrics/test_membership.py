"""Membership inference and forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from backfire.base import Evidence, Probe, Sample
from backfire.registry import build
from tests.helpers.memorization import values


def scored(logprobs: Sequence[float], name: str) -> list[Sample]:
    return [
        Sample(f"{name}{n}", "clean", "?", "a", answer_logprob=float(logprob), answer_tokens=4)
        for n, logprob in enumerate(logprobs)
    ]


def test_membership_inference_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(-6, 3, 90).round(1), rng.normal(-8, 3, 70).round(1)
    hard_in, hard_out = rng.normal(-9, 3, 90), rng.normal(-9, 3, 70)
    pair = Probe(scored(inside, "in"), scored(hard_in, "in"))
    evidence = Evidence(scored(outside, "out"), base=scored(hard_out, "out"), members=pair)
    found = values("membership-inference", evidence)
    truth = [1] * 90 + [0] * 70
    for part, scores in (
        ("", [*inside, *outside]),
        ("[reference]", [*(inside - hard_in), *(outside - hard_out)]),
    ):
        area, recall = found[f"membership_auc{part}"], found[f"membership_recall{part}"]
        assert area.value == pytest.approx(roc_auc_score(truth, scores))
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert recall.value == pytest.approx(max(true[false <= 0.1]))
        assert area.low < area.value < area.high and area.n == 160
    assert values("membership-inference", Evidence(clean=[])) == {}
    rare = {"name": "membership-inference", "false_positive_rate": 0.01}
    found = values(rare, evidence)  # of 70 rows hardly one exceeds the threshold
    assert found["membership_recall"].low == 0 < found["membership_recall"].value


def test_forgetting_by_hand() -> None:
    metric = build("metrics", "forgetting")
    pair = Probe(scored([-8, -12], "t"), scored([-4, -6], "t"))
    evidence = Evidence(clean=[], texts={metric.texts_key: pair})
    found = values("forgetting", evidence)
    assert found["forgetting_perplexity"].value == pytest.approx(math.exp(20 / 8))
    assert found["forgetting"].value == pytest.approx(math.exp(10 / 8))
    assert values("forgetting", Evidence(clean=[])) == {}
