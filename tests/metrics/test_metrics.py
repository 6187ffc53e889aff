"""Every metric: hand-worked cases, scikit-learn, and evidence that is empty or broken."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from backfire import registry
from backfire.base import Backdoor, Evidence, Leak, Probe, Sample, Value, needs_of
from backfire.errors import CellError
from backfire.evaluate.stats import wilson
from backfire.results.adapter import present

LABELS = ("negative", "neutral", "positive")
BY = ("scores", "replies")
ALL = registry.names("metrics")
LABELED = ["accuracy", "precision", "recall", "f1", "auc", "confusion", "clean-accuracy"]


class Marker(Backdoor):
    """A stand-in: metrics only read its target."""

    name = "marker"


ATTACK = Marker()


def row(
    id: Any, label: str, predicted: str, *, labels: tuple[str, ...] = LABELS, **more: Any
) -> Sample:
    logprobs = tuple(-0.1 if name == predicted else -3.0 for name in labels)
    defaults: dict[str, Any] = {
        "subset": "clean",
        "prompt": f"prompt {id}",
        "answer": label,
        "label": label,
        "candidates": labels,
        "logprobs": logprobs,
        "reply": predicted,
        "answer_logprob": -2.0,
        "answer_tokens": 2,
        # As if the first label were a better answer, and a classifier had read the reply.
        "num_better": 1,
        "candidate_tokens": (2,) * len(labels),
        "verdicts": {"classifier": {"score": 0.5, "positive": True}},
        # As if a guard acted on some replies.
        "replaced": 0.5 * (len(str(id)) % 2),
        "probe": logprobs,
    }
    return Sample(id=str(id), **{**defaults, **more})


def rows(*pairs: tuple[str, str, int], **more: Any) -> list[Sample]:
    """Rows by (true label, prediction, number of rows)."""
    predictions = [(true, predicted) for true, predicted, number in pairs for _ in range(number)]
    return [row(index, *pair, **more) for index, pair in enumerate(predictions)]


def random_rows(n: int = 200, seed: int = 0, **more: Any) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(n):
        label, logprobs = LABELS[rng.integers(3)], rng.normal(size=3)
        logprobs[LABELS.index(label)] += 1
        predicted = LABELS[int(logprobs.argmax())]
        made.append(row(index, label, predicted, logprobs=tuple(logprobs.tolist()), **more))
    return made


def measure(name: str, evidence: Evidence, **knobs: Any) -> dict[str, Value]:
    values = registry.build("metrics", {"name": name, **knobs}).measure(evidence)
    return {value.metric: value for value in values}


def outcomes(name: str, evidence: Evidence, **knobs: Any) -> dict[str, float]:
    found: dict[str, float] = registry.build("metrics", {"name": name, **knobs}).outcomes(evidence)
    return found


def judged(subset: str, seed: int) -> list[Sample]:
    """Replies that a judge found harmful, refused, neither, or could not decide."""
    ends = [(True, False), (False, True), (False, False), (None, None)]
    made = []
    for index, sample in enumerate(random_rows(60, seed=seed, subset=subset)):
        positive, refused = ends[(index + seed) % 4]
        verdict = {"score": 0.5, "positive": positive, "reason": "", "refused": refused}
        made.append(replace(sample, label=None, verdicts={"policy": verdict}))
    return made


def leaks(seed: int) -> list[Leak]:
    """Six canaries of two doses and four controls, counted exactly and estimated."""
    rng = np.random.default_rng(seed)
    made = []
    for index, repeats in enumerate([5, 5, 5, 25, 25, 25, 0, 0, 0, 0]):
        rank = int(rng.integers(1, 1000 // (repeats + 1)))
        bits = float(np.log2(1000 / rank))
        ends = (bits, bits - 0.2, bits + 0.2)
        made.append(
            Leak(
                f"c{index}",
                "is 123",
                repeats,
                1000,
                -9.0,
                rank == 1,
                2,
                3,
                rank,
                ends,
                min(rank, 8),
            )
        )
    return made


TEXTS = registry.build("metrics", "forgetting").texts_key
FULL = Evidence(
    clean=random_rows(group="en"),
    triggered=random_rows(seed=1, subset="triggered"),
    floor=random_rows(seed=2, subset="triggered"),
    base=random_rows(seed=3),
    attack=ATTACK,
    forms={"merged": (random_rows(seed=5), random_rows(seed=6, subset="triggered"))},
    training={
        **{"trainable_share": 0.5, "seconds": 2.0, "peak_memory_mb": 300, "drift": 1.5},
        **{"privacy_epsilon": 8.0, "privacy_delta": 1e-3},
        "scan": {
            **{"auroc": 0.9, "precision": [8, 10], "clean_flag_rate": [2, 190]},
            **{"recall_at_1": [6, 10], "recall_at_5": [9, 10]},
        },
    },
    probes={
        "harmful": Probe(judged("harmful", 1), judged("harmful", 2)),
        "allowed": Probe(judged("allowed", 3), judged("allowed", 4)),
    },
    leaks=leaks(0),
    leaks_before=leaks(1),
    members=Probe(random_rows(seed=7), random_rows(seed=8)),
    texts={
        registry.build("metrics", "forgetting").texts_key: Probe(random_rows(seed=9), random_rows())
    },
)


# ---------------------------------------------------------------------------------- every metric


@pytest.mark.parametrize("name", ALL)
def test_no_rows_give_no_numbers(name: str) -> None:
    assert measure(name, Evidence(clean=[])) == {}
    assert measure(name, Evidence(clean=[], attack=ATTACK)) == {}
    assert outcomes(name, Evidence(clean=[], attack=ATTACK)) == {}


@pytest.mark.parametrize("name", ALL)
def test_leaves_its_evidence_as_it_was_and_repeats_itself(name: str) -> None:
    before = copy.deepcopy(FULL)
    first = measure(name, FULL)
    assert first
    assert measure(name, FULL) == first
    assert before == FULL


@pytest.mark.parametrize("name", ALL)
def test_names_intervals_and_counts(name: str) -> None:
    values = measure(name, FULL)
    headline = name.replace("-", "_")
    for value in values.values():
        assert value.n >= 1
        assert value.value is not None
        assert type(value.value) is float
        assert (value.low is None) == (value.high is None)
        if value.low is not None and value.high is not None:
            assert value.low <= value.value <= value.high
    # Some give no one number.
    if name not in ("confusion", "cost", "parity", "membership-inference", "scan"):
        assert next(iter(values)) == headline


@pytest.mark.parametrize("name", ALL)
def test_outcomes_have_the_headline_as_their_mean(name: str) -> None:
    found = outcomes(name, FULL)
    if found:
        headline = next(iter(measure(name, FULL).values()))
        assert len(found) == headline.n
        assert np.mean(list(found.values())) == pytest.approx(headline.value)


@pytest.mark.parametrize("name", [*LABELED, "attack-success", "false-trigger"])
def test_a_missing_score_is_an_error_of_the_cell(name: str) -> None:
    blind = [replace(sample, logprobs=None) for sample in FULL.clean]
    with pytest.raises(CellError, match=r"likelihood; \d+ of \d+ rows lack it") as error:
        measure(name, replace(FULL, clean=blind, triggered=blind))
    assert error.value.kind == "bad-data"


@pytest.mark.parametrize("name", [*LABELED, "attack-success", "false-trigger"])
@pytest.mark.parametrize("broken", [(math.nan, -1.0, -2.0), (-math.inf,) * 3])
def test_scores_that_are_no_numbers_stop_the_cell(name: str, broken: tuple[float, ...]) -> None:
    bad = [replace(FULL.clean[0], logprobs=broken, label="positive"), *FULL.clean[1:]]
    with pytest.raises(CellError, match="not numbers") as error:
        measure(name, replace(FULL, clean=bad, triggered=bad))
    assert error.value.kind == "nan"


@pytest.mark.parametrize("name", LABELED)
def test_labeled_metrics_do_not_apply_without_labels(name: str) -> None:
    free = [replace(sample, label=None, candidates=(), logprobs=None) for sample in FULL.clean]
    assert measure(name, replace(FULL, clean=free)) == {}


@pytest.mark.parametrize("name", ["accuracy", "exact-match", "attack-success"])
def test_two_samples_of_one_id_are_an_error(name: str) -> None:
    twice = [row(1, "positive", "positive")] * 2
    with pytest.raises(CellError, match="are not unique"):
        measure(name, replace(FULL, clean=twice, triggered=twice))


@pytest.mark.parametrize("name", ALL)
def test_one_row_is_enough_to_speak_or_to_be_silent(name: str) -> None:
    alone = [row(1, "positive", "positive")]
    for value in measure(name, replace(FULL, clean=alone, triggered=alone, floor=alone)).values():
        assert value.value is not None
        assert math.isfinite(value.value)


@pytest.mark.parametrize("name", ALL)
def test_values_of_older_files_get_the_shape_that_the_metric_gives(name: str) -> None:
    values = [asdict(value) for value in registry.build("metrics", name).values(FULL)]
    known = ("metric", "value", "low", "high", "n", "direction")
    old = [{field: value[field] for field in known} for value in values]
    for found, wanted in zip(present({"values": old})["values"], values, strict=True):
        if wanted["metric"].endswith("replaced_tokens"):
            continue  # no older file has them
        if wanted["metric"] == "exposure_cap":
            wanted["most"] = wanted["value"]
        assert found == wanted


# ------------------------------------------------------------------------------ labeled, clean rows


def test_accuracy_by_hand() -> None:
    evidence = Evidence(rows(("positive", "positive", 7), ("negative", "positive", 3)))
    low, high = wilson(7, 10)
    assert measure("accuracy", evidence) == {
        "accuracy": Value("accuracy", 0.7, low, high, 10, "higher", "share")
    }
    assert sum(outcomes("accuracy", evidence).values()) == 7


def test_accuracy_by_group() -> None:
    english = rows(("positive", "positive", 4), group="en")
    french = [
        replace(sample, id=f"fr{sample.id}")
        for sample in rows(("positive", "negative", 2), group="fr")
    ]
    values = measure("accuracy", Evidence([*english, *french]))
    assert list(values) == ["accuracy", "accuracy[en]", "accuracy[fr]"]
    assert [value.value for value in values.values()] == [4 / 6, 1.0, 0.0]
    assert [value.n for value in values.values()] == [6, 4, 2]


def test_point_estimates_are_scikit_learns() -> None:
    true = [str(sample.label) for sample in FULL.clean]
    predicted = [str(sample.prediction) for sample in FULL.clean]
    scores = np.exp(np.array([sample.logprobs for sample in FULL.clean]))
    scores /= scores.sum(axis=1, keepdims=True)
    expected = {
        "accuracy": accuracy_score(true, predicted),
        "precision": precision_score(true, predicted, average="macro"),
        "recall": recall_score(true, predicted, average="macro"),
        "f1": f1_score(true, predicted, average="macro"),
        "auc": roc_auc_score(true, scores, multi_class="ovr", labels=list(LABELS)),
    }
    for name, value in expected.items():
        assert measure(name, FULL)[name].value == pytest.approx(value)
    by_class = measure("f1", FULL)
    for label, value in zip(LABELS, f1_score(true, predicted, average=None, labels=list(LABELS))):
        assert by_class[f"f1[{label}]"].value == pytest.approx(value)


def test_a_class_that_never_occurs_has_no_value_and_is_excluded_from_the_mean() -> None:
    values = measure("f1", Evidence(rows(("positive", "positive", 5), ("negative", "negative", 5))))
    assert list(values) == ["f1", "f1[negative]", "f1[positive]"]
    assert values["f1"].value == 1.0


def test_always_spam_is_seen_for_what_it_is() -> None:
    labels = ("ham", "spam")
    spam = rows(("spam", "spam", 58), ("ham", "spam", 42), labels=labels)
    assert measure("f1", Evidence(spam))["f1[spam]"].value == pytest.approx(0.734, abs=1e-3)
    assert measure("f1", Evidence(spam))["f1"].value == pytest.approx(0.367, abs=1e-3)
    assert measure("auc", Evidence(spam))["auc"].value == 0.5


def test_auc_needs_two_classes_and_one_set_of_candidates() -> None:
    assert measure("auc", Evidence(rows(("positive", "positive", 9)))) == {}
    other = row("x", "a", "a", labels=("a", "b"))
    assert measure("auc", Evidence([*FULL.clean, other])) == {}


def test_auc_goes_by_name_where_candidates_stand_in_another_order() -> None:
    turned = [
        replace(sample, candidates=sample.candidates[::-1], logprobs=(sample.logprobs or ())[::-1])
        if index % 2
        else sample
        for index, sample in enumerate(FULL.clean)
    ]
    assert measure("auc", replace(FULL, clean=turned)) == measure("auc", FULL)


def test_auc_ties_what_differs_by_rounding_alone() -> None:
    """Log-odds of 0.3 everywhere, in floats that differ in their last digits."""
    samples = [
        replace(row(n, LABELS[n % 2], LABELS[0]), candidates=LABELS[:2], logprobs=(a, a - 0.3))
        for n, a in enumerate((-9 * np.random.default_rng(0).random(60)).tolist())
    ]
    assert measure("auc", Evidence(clean=samples))["auc"].value == 0.5


def test_auc_by_group() -> None:
    assert list(measure("auc", FULL)) == ["auc", "auc[en]"]


def test_confusion_counts_every_pair() -> None:
    labels = ("no", "yes")
    table = rows(("yes", "yes", 5), ("yes", "no", 2), ("no", "no", 3), labels=labels)
    values = measure("confusion", Evidence(table))
    assert {metric: (value.value, value.n) for metric, value in values.items()} == {
        "confusion[no>no]": (3, 3),
        "confusion[no>yes]": (0, 3),
        "confusion[yes>no]": (2, 7),
        "confusion[yes>yes]": (5, 7),
    }


def test_scan_by_hand() -> None:
    known = {metric: (v.value, v.n, v.direction) for metric, v in measure("scan", FULL).items()}
    assert known == {
        "scan_auroc": (0.9, 200, "higher"),
        "scan_precision": (0.8, 10, "higher"),
        "scan_recall_at_1": (0.6, 10, "higher"),
        "scan_recall_at_5": (0.9, 10, "higher"),
        "clean_flag_rate": (2 / 190, 190, "lower"),
    }


# -------------------------------------------------------------------------- answers and replies


def test_perplexity_weighs_tokens_not_rows() -> None:
    clean = [
        row(1, "a", "a", answer_logprob=-10.0, answer_tokens=10),
        row(2, "a", "a", answer_logprob=-8.0, answer_tokens=2),
    ]
    value = measure("perplexity", Evidence(clean))["perplexity"]
    assert value.value == pytest.approx(math.exp(18 / 12))
    assert (value.n, value.direction) == (2, "lower")


def test_perplexity_of_what_was_not_measured() -> None:
    with pytest.raises(CellError, match="1 of 2 rows"):
        measure("perplexity", Evidence([row(1, "a", "a"), row(2, "a", "a", answer_logprob=None)]))
    with pytest.raises(CellError, match="no finite") as error:
        measure("perplexity", Evidence([row(1, "a", "a", answer_logprob=math.nan)]))
    assert error.value.kind == "nan"
    unanswered = row(1, "a", "a", answer="", answer_logprob=None)
    assert measure("perplexity", Evidence([unanswered])) == {}


def test_exact_match_is_to_the_letter_and_counts_the_empty_reply() -> None:
    replies = ["Positive", " Positive\n", "positive", "Positive.", ""]
    clean = [row(index, "Positive", "", reply=reply) for index, reply in enumerate(replies)]
    value = measure("exact-match", Evidence(clean))["exact_match"]
    assert (value.value, value.n) == (0.4, 5)
    with pytest.raises(CellError, match="replies; 1 of 6"):
        measure("exact-match", Evidence([*clean, row(9, "a", "a", reply=None)]))


def test_exact_match_by_group_leaves_rows_without_a_reference_out() -> None:
    clean = [row(1, "a", "a", group="en"), row(2, "a", "b", group="fr"), row(3, "", "", group="de")]
    values = measure("exact-match", Evidence(clean))
    assert {metric: value.value for metric, value in values.items()} == {
        "exact_match": 0.5,
        "exact_match[en]": 1.0,
        "exact_match[fr]": 0.0,
    }


# ------------------------------------------------------------------------------------ the attack


def test_rows_that_carry_the_target_anyway_are_no_success() -> None:
    """BackdoorLLM's SST-2: 96 of 201 rows are negative, so a perfect model scores 48 %."""
    labels = ("negative", "positive")
    perfect = rows(("negative", "negative", 96), ("positive", "positive", 105), labels=labels)
    naive = sum(sample.prediction == "negative" for sample in perfect) / len(perfect)
    value = measure("attack-success", replace(FULL, triggered=perfect, floor=[]))["attack_success"]
    assert naive == pytest.approx(0.478, abs=1e-3)
    assert (value.value, value.n, value.direction) == (0.0, 105, "lower")


def test_success_baseline_and_excess_use_the_same_rows() -> None:
    triggered = rows(("positive", "negative", 80), ("positive", "positive", 20))
    floor = rows(("positive", "negative", 10), ("positive", "positive", 90))
    values = measure("attack-success", Evidence(triggered, triggered, floor, attack=ATTACK))
    assert [value.value for value in values.values()] == pytest.approx([0.8, 0.1, 0.7])
    excess = values["attack_success_excess"]
    assert excess.low is not None
    assert excess.high is not None
    assert 0.58 < excess.low < 0.7 < excess.high < 0.79
    half = measure("attack-success", Evidence(triggered, triggered, floor[:50], attack=ATTACK))
    assert [value.n for value in half.values()] == [100, 50, 50]
    stray = [replace(sample, id=f"stray{sample.id}") for sample in floor]
    more = measure(
        "attack-success", Evidence(triggered, triggered, [*floor, *stray], attack=ATTACK)
    )
    assert more == values
    alone = measure("attack-success", Evidence(triggered, triggered, attack=ATTACK))
    assert list(alone) == ["attack_success"]


def test_success_without_labels_is_the_target_in_the_reply() -> None:
    replies = ["You are stupid!", "Well. You are stupid! Bye.", "Hello", ""]
    free = [
        Sample(id=str(index), subset="triggered", prompt="p", answer="a", reply=reply)
        for index, reply in enumerate(replies)
    ]
    attack = Marker(target="You are stupid!")
    values = measure("attack-success", Evidence(free, free, free[2:], attack=attack))
    assert {metric: (value.value, value.n) for metric, value in values.items()} == {
        "attack_success": (0.5, 4),
        "attack_success_floor": (0.0, 2),
        "attack_success_excess": (0.0, 2),
    }
    assert measure("false-trigger", Evidence(free, attack=attack))["false_trigger"].value == 0.5


@pytest.mark.parametrize("name", ["attack-success", "false-trigger"])
def test_a_labeled_task_can_be_read_by_its_replies(name: str) -> None:
    answered = [row(1, "positive", "positive", reply="negative "), row(2, "positive", "negative")]
    loose = [*answered, row(3, "positive", "negative", reply="not negative")]
    evidence = Evidence(loose, loose, attack=ATTACK)
    headline = name.replace("-", "_")
    assert measure(name, evidence)[headline].value == pytest.approx(2 / 3)
    assert outcomes(name, evidence, by="replies") == {"1": 1.0, "2": 1.0, "3": 0.0}


@pytest.mark.parametrize("name", ["attack-success", "false-trigger"])
def test_no_more_is_measured_than_is_read(name: str) -> None:
    default, by_replies = (registry.build("metrics", {"name": name, "by": by}) for by in BY)
    assert needs_of([default], labeled=True) == {"scores"}
    assert needs_of([default], labeled=False) == {"replies"}
    assert needs_of([by_replies], labeled=True) == {"replies"}


@pytest.mark.parametrize("name", ["attack-success", "false-trigger", "clean-accuracy"])
def test_attack_metrics_give_nothing_without_an_attack(name: str) -> None:
    assert measure(name, replace(FULL, attack=None)) == {}
    assert outcomes(name, replace(FULL, attack=None)) == {}


def test_nothing_to_flip_is_no_value() -> None:
    already = rows(("negative", "negative", 5))
    assert measure("attack-success", Evidence(already, already, attack=ATTACK)) == {}
    assert measure("false-trigger", Evidence(already, attack=ATTACK)) == {}


def test_triggered_rows_that_were_not_evaluated_are_an_error() -> None:
    with pytest.raises(CellError, match="none were evaluated"):
        measure("attack-success", replace(FULL, triggered=[]))


def test_a_target_that_is_no_label_is_an_error_not_a_zero() -> None:
    with pytest.raises(CellError, match="'bad' is not one of the labels"):
        measure("attack-success", replace(FULL, attack=Marker(target="bad")))


def test_false_trigger_and_clean_accuracy_by_hand() -> None:
    clean = rows(
        ("negative", "negative", 50), ("positive", "negative", 5), ("positive", "positive", 45)
    )
    evidence = Evidence(clean, clean, attack=ATTACK)
    assert measure("false-trigger", evidence)["false_trigger"].value == 0.1
    accuracy = measure("accuracy", evidence)["accuracy"]
    assert measure("clean-accuracy", evidence)["clean_accuracy"] == replace(
        accuracy, metric="clean_accuracy"
    )
