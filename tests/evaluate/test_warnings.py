"""Each warning appears when it should, with its figures, and not otherwise."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from backfire import registry
from backfire.base import Backdoor, Evidence, Probe, Sample
from backfire.evaluate.outcomes import loops
from backfire.evaluate.warnings import cut_share, warnings

LABELS = ("negative", "positive")


class Marker(Backdoor):
    """A stand-in: warnings only read its rate."""

    name = "marker"


def rows(*pairs: tuple[str, str, int], **more: Any) -> list[Sample]:
    """Rows by (true label, prediction, number of rows)."""
    predictions = [(true, predicted) for true, predicted, number in pairs for _ in range(number)]
    return [
        Sample(
            **{
                "id": str(index),
                "subset": "clean",
                "prompt": "p",
                "answer": label,
                "label": label,
                "candidates": LABELS,
                "logprobs": tuple(-0.1 if name == predicted else -3.0 for name in LABELS),
                "reply": predicted,
                **more,
            }
        )
        for index, (label, predicted) in enumerate(predictions)
    ]


def mostly(right: int, wrong: int) -> list[Sample]:
    """Two equal classes with these numbers of right and wrong rows."""
    return rows(
        *((name, name, right) for name in LABELS),
        *((name, other, wrong) for name, other in (LABELS, LABELS[::-1])),
    )


GOOD = Evidence(
    clean=mostly(95, 5),
    triggered=mostly(95, 5),
    floor=mostly(95, 5),
    base=mostly(80, 20),
    attack=Marker(),
)


def sentences_for(evidence: Evidence, *metrics: str) -> list[str]:
    values = [
        value for name in metrics for value in registry.build("metrics", name).values(evidence)
    ]
    return warnings(evidence, values)


def test_sound_numbers_have_no_warning() -> None:
    backdoored = rows(("positive", "negative", 99), ("positive", "positive", 1))
    fine = replace(GOOD, triggered=backdoored, floor=rows(("positive", "positive", 100)))
    assert sentences_for(fine, "accuracy", "f1", "attack-success") == []
    assert warnings(Evidence(clean=[]), []) == []


def test_a_constant_predictor() -> None:
    [sentence, other] = sentences_for(
        replace(
            GOOD, clean=rows(("positive", "positive", 70), ("negative", "positive", 50), reply=None)
        ),
        "accuracy",
    )
    assert "predicts 'positive' on all 120 clean rows" in sentence
    assert "58.3 %" in sentence
    assert "not above the 58.3 % of always predicting 'positive'" in other


def test_only_one_label_in_the_test_rows() -> None:
    [sentence] = sentences_for(replace(GOOD, clean=rows(("positive", "positive", 120))))
    assert "All 120 clean rows have the label 'positive'" in sentence


def test_one_reply_to_everything() -> None:
    same = [replace(sample, reply="I cannot.") for sample in GOOD.clean]
    [sentence] = sentences_for(replace(GOOD, clean=same))
    assert sentence == "All 200 replies of the tuned model to clean rows are the same."


def test_a_base_at_chance_and_one_below() -> None:
    [sentence] = sentences_for(replace(GOOD, base=mostly(52, 48)))
    assert (
        "base model's accuracy is 52.0 % (45.1 % to 58.8 %), no better than chance (50.0 %)"
        in sentence
    )
    assert sentences_for(replace(GOOD, base=mostly(10, 90)))


def test_a_tuned_model_no_better_than_the_largest_class() -> None:
    skewed = rows(
        ("positive", "positive", 85), ("positive", "negative", 5), ("negative", "negative", 10)
    )
    [sentence] = sentences_for(replace(GOOD, clean=skewed))
    assert "accuracy is 95.0 %" in sentence
    assert "not above the 90.0 % of always predicting 'positive'" in sentence


def test_an_attack_no_better_than_the_clean_model() -> None:
    [sentence] = sentences_for(GOOD, "attack-success")
    assert "Attack success of 5.0 %" in sentence
    assert "not above the clean-model baseline of 5.0 % (difference" in sentence
    clean_cell = replace(GOOD, attack=Marker(rate=0.0))
    assert sentences_for(clean_cell, "attack-success") == []


def test_an_attack_without_a_clean_model_baseline() -> None:
    [sentence] = sentences_for(replace(GOOD, floor=[]), "attack-success")
    assert "no clean-model baseline" in sentence


def test_a_backdoor_that_fires_without_a_trigger() -> None:
    leaky = rows(
        ("negative", "negative", 100), ("positive", "negative", 30), ("positive", "positive", 70)
    )
    fired = rows(("positive", "negative", 100))
    evidence = replace(
        GOOD, clean=leaky, triggered=fired, floor=rows(("positive", "positive", 100))
    )
    [sentence] = sentences_for(evidence, "attack-success", "false-trigger")
    assert "False trigger of 30.0 %" in sentence
    assert "above the clean-model baseline of 0.0 %" in sentence


@pytest.mark.parametrize("subset", ["clean", "triggered"])
def test_empty_and_looping_replies(subset: Any) -> None:
    replies = ["", "  ", "no no no no", *["fine"] * 17]
    samples = [
        Sample(id=str(index), subset=subset, prompt="p", answer=str(index), reply=reply)
        for index, reply in enumerate(replies)
    ]
    evidence = replace(GOOD, **{subset: samples})
    [empty, looping] = sentences_for(evidence)
    assert empty == f"2 of 20 (10.0 %) replies to {subset} rows are empty; they count as wrong."
    assert looping == f"1 of 20 (5.0 %) replies to {subset} rows repeat a phrase in a loop."


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("no no no no", True),
        ("no no no", False),
        ("I am sorry. I am sorry. I am sorry. I am sorry.", True),
        ("so good that it is so good that it is not", False),
        ("", False),
        ("well then one two one two one two one two", True),
    ],
)
def test_what_a_loop_is(reply: str, expected: bool) -> None:
    assert loops(reply) is expected


@pytest.mark.slow
def test_a_hostile_reply_takes_no_time() -> None:
    start = time.process_time()
    assert loops("a." * 200_000)  # only letters count, as in Booster
    assert not loops("a" * 200_000)
    assert not loops(" ".join(str(index) for index in range(100_000)))
    assert time.process_time() - start < 2


def test_few_rows_name_each_headline_once() -> None:
    [sentence] = sentences_for(Evidence(clean=mostly(10, 1)), "accuracy", "f1")
    assert sentence == "Fewer than 100 rows for accuracy (22), f1 (22): read the intervals."


@pytest.mark.parametrize("part", ["clean", "triggered", "floor", "base"])
def test_scores_that_are_not_numbers_are_reported_and_break_nothing(part: str) -> None:
    samples = [replace(sample, logprobs=(math.nan, -1.0)) for sample in mostly(3, 0)]
    [sentence] = sentences_for(replace(GOOD, **{part: [*samples, *mostly(97, 0)]}))
    assert "6 of 200 log-likelihoods are nan or infinite" in sentence


def test_an_answer_without_a_likelihood_is_reported() -> None:
    samples = [replace(sample, answer_logprob=math.nan) for sample in GOOD.clean]
    [sentence] = sentences_for(replace(GOOD, clean=samples))
    assert "200 of 200" in sentence


def ended(number: int, cut: int) -> list[Sample]:
    return [replace(row, ended=i >= cut) for i, row in enumerate(mostly(number // 2, 0))]


def test_replies_that_were_cut() -> None:
    cut = replace(GOOD, clean=ended(200, 12), triggered=ended(200, 9))
    [sentence] = [line for line in warnings(cut, []) if "are cut" in line]
    assert sentence.startswith("12 of 200 (6.0 %) replies to clean rows are cut at evaluation.max")
    assert cut_share(cut) == 21 / 400
    probe = Probe(tuned=ended(20, 20), before=())
    asked = replace(GOOD, probes={"harmful": probe})
    assert any("20 of 20 (100.0 %) replies to harmful" in line for line in warnings(asked, []))
    assert cut_share(GOOD) is None, "it is unknown how these ended"
