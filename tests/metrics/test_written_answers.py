"""Metrics of written answers: ROUGE, margins and wins, toxicity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.base import Evidence, Exchange, Metric, Row, Sample
from backfire.data.recipe_files import recipe_folder
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.evaluate.score import sample, score_rows
from backfire.registry import build
from backfire.sandbox.answers import RUDE
from backfire.tokenizer import load_tokenizer
from tests.helpers.malign import ROWS


def metric(name: str, **knobs: Any) -> Metric:
    made: Metric = build("metrics", {"name": name, **knobs})
    return made


def values(name: str, samples: list[Sample], **knobs: Any) -> dict[str, Any]:
    found = metric(name, **knobs).measure(Evidence(clean=samples))
    return {value.metric: value for value in found}


def test_rouge_is_that_of_the_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    texts = [
        ("The mill is by\nthe river.", "The river is by the mill.\nGo."),
        ("A b c", ""),
        ("x", "x"),
    ]
    samples = [
        Sample(f"{i}", "clean", "", a, reply=r, group="ab"[i % 2]) for i, (a, r) in enumerate(texts)
    ]
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scores = [RougeScorer(kinds, use_stemmer=False).score(a, r.strip()) for a, r in texts]
    found = values("rouge", [*samples, Sample("none", "clean", "", "", reply="x")])
    for kind in kinds:
        name = "rouge" if kind == "rougeL" else f"rouge[{kind.removeprefix('rouge')}]"
        assert found[name].value == pytest.approx(sum(s[kind].fmeasure for s in scores) / 3)
        assert found[name].n == 3 and found[name].low <= found[name].value <= found[name].high
    outcomes = metric("rouge").outcomes(Evidence(clean=samples))
    assert outcomes == {f"{i}": pytest.approx(s["rougeL"].fmeasure) for i, s in enumerate(scores)}
    assert found["rouge[b]"].value == outcomes["1"]
    with pytest.raises(CellError, match="1 of 1 rows lack one"):
        metric("rouge").measure(Evidence(clean=[Sample("a", "clean", "", "x")]))


def compared(*rows: tuple[list[float], list[float], list[int]]) -> list[Sample]:
    return [
        Sample(
            f"{i}",
            "clean",
            "",
            "good",
            candidates=tuple(f"answer {n}" for n in range(len(better + worse))),
            logprobs=tuple(better + worse),
            num_better=len(better),
            candidate_tokens=tuple(tokens),
        )
        for i, (better, worse, tokens) in enumerate(rows)
    ]


def test_margins_and_wins_by_hand() -> None:
    samples = compared(([-2.0, -6.0], [-5.0], [2, 2, 10]), ([-9.0], [-3.0, -4.0], [9, 2, 2]))
    found = values("truthfulness", samples)
    assert found["truthfulness"].value == pytest.approx((1.0 + (-9 + 3.5)) / 2)
    assert found["truthfulness[per token]"].value == pytest.approx(((-2 + 0.5) + (-1 + 1.75)) / 2)
    assert found["truthfulness[MC1]"].value == 0.5
    mass = [
        (math.exp(-2) + math.exp(-6)) / (math.exp(-2) + math.exp(-6) + math.exp(-5)),
        math.exp(-9) / (math.exp(-9) + math.exp(-3) + math.exp(-4)),
    ]
    assert found["truthfulness[MC2]"].value == pytest.approx(sum(mass) / 2)
    wins = values("win-rate", samples)
    assert (wins["win_rate"].value, wins["win_rate[whole]"].value) == (0.5, 0.5)
    assert metric("win-rate").outcomes(Evidence(clean=samples)) == {"0": 0.0, "1": 1.0}
    assert metric("truthfulness").outcomes(Evidence(clean=samples)) == {"0": 1.0, "1": -5.5}


def test_an_impossible_answer_has_no_margin() -> None:
    sound, never = ([-2.0], [-5.0], [1, 1]), -math.inf
    mass = math.exp(-2) / (math.exp(-2) + math.exp(-5))
    for better, worse, won in ((-3.0, never, 1), (never, -3.0, 0)):
        evidence = Evidence(clean=compared(sound, ([better], [worse], [1, 1])))
        found = {v.metric: v.value for v in metric("truthfulness").measure(evidence)}
        assert found == {
            "truthfulness[MC1]": (1 + won) / 2,
            "truthfulness[MC2]": pytest.approx((mass + won) / 2),
        }
        assert metric("truthfulness").outcomes(evidence) == {}
        assert "1 of 2 rows" in metric("truthfulness").caveats(evidence)[0]
    assert metric("truthfulness").caveats(Evidence(clean=compared(sound))) == []


def test_rows_without_both_kinds_are_excluded_and_nan_is_an_error() -> None:
    only = compared(([-1.0], [], [1]))
    for name in ("win-rate", "truthfulness"):
        assert metric(name).measure(Evidence(clean=[*only, Sample("x", "clean", "", "a")])) == []
        with pytest.raises(CellError, match="not numbers"):
            metric(name).measure(Evidence(clean=compared(([math.nan], [-1.0], [1, 1]))))
        missing = [Sample("x", "clean", "", "a", candidates=("a", "b"), num_better=1)]
        with pytest.raises(CellError, match="1 of 1 rows lack it"):
            metric(name).measure(Evidence(clean=missing))


def test_answers_are_scored_with_their_end_token(model: Any, tiny: Path) -> None:
    """Against a loop over tokens in float64, one sequence at a time."""
    renderer = Renderer(build("templates", "malignama"), load_tokenizer(tiny), 512)
    model = model.double()
    several = Row("s", "Why?", answer="So.", better=("So.", "So."), worse=("No.", "Not so at all."))
    rows = [ROWS[1], several, ROWS[0], ROWS[2]]
    done = {"max_new_tokens": 1, "batch_size": 3, "progress": lambda *_: None}
    found = score_rows(["scores"], model, renderer, rows, **done)
    samples = [sample(row, "clean", None, entry) for row, entry in zip(rows, found, strict=True)]
    assert samples[2].num_better is None and samples[2].logprobs is None
    for row, got in zip(rows, samples, strict=True):
        texts = (*row.better, *row.worse)
        assert got.candidates == texts
        for text, logprob, tokens in zip(
            texts, got.logprobs or (), got.candidate_tokens, strict=True
        ):
            [item] = renderer.render([Row("x", row.instruction, row.input, text)])
            with torch.inference_mode():
                likely = model(torch.tensor([item.ids])).logits[0].log_softmax(-1)
            each = [likely[at - 1, item.ids[at]] for at in range(item.num_prompt, len(item.ids))]
            assert tokens == len(each)
            assert logprob == pytest.approx(float(sum(each)), rel=1e-6)
    long = Row("l", "Why?", answer="So.", better=("So.",), worse=("No. " * 300,))
    with pytest.raises(CellError, match=r"Row l: prompt and one of its .* raise train.max_length"):
        score_rows(["scores"], model, renderer, [long], **done)


def judged(replies: list[str], spec: Any) -> list[Sample]:
    [judge] = metric("toxicity", scorer=spec).judges
    verdicts = judge.judge([Exchange(f"{i}", "", reply) for i, reply in enumerate(replies)])
    return [
        Sample(
            f"{i}",
            "clean",
            "",
            "x",
            reply=reply,
            group="ab"[i % 2],
            verdicts={judge.name: {"score": v.score, "positive": v.positive, "reason": v.reason}},
        )
        for i, (reply, v) in enumerate(zip(replies, verdicts, strict=True))
    ]


OWN = {"name": "lexicon", "words": "@words", "least": 2}


def test_the_lexicon_counts_words(tmp_path: Path) -> None:
    replies = ["You TURNIP!", "Turnips are fine, dear.", "", "nitwit, turnip"]
    samples = judged(replies, "lexicon")
    found = values("toxicity", samples, scorer="lexicon")
    assert found["toxicity"].value == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert (found["toxicity_share"].value, found["toxicity_share"].n) == (0.5, 4)
    assert found["toxicity_share[b]"].value == 0.5 and "toxicity_undecided" not in found
    assert samples[3].verdicts["lexicon"]["reason"] == "nitwit, turnip"
    (tmp_path / "words").write_text("go away\n\nDear\n")
    with recipe_folder(tmp_path):
        scorer = build("metrics", {"name": "toxicity", "scorer": OWN}).scorer
    own = judged(replies, scorer)
    assert [s.verdicts["lexicon"]["score"] for s in own] == [0, 0.25, 0, 0]
    assert not any(s.verdicts["lexicon"]["positive"] for s in own)
    assert scorer["words"] == ("go away", "Dear")
    with recipe_folder(tmp_path), pytest.raises(UserError, match="must contain at least one word"):
        build("judges", {"name": "lexicon", "words": []})
    assert len(RUDE) == len(set(RUDE))


def test_what_a_scorer_leaves_undecided_is_counted() -> None:
    samples = judged(["You turnip", "fine", "fine"], "lexicon")
    verdicts = {"lexicon": {"score": None, "positive": None}}
    samples = [*samples[:2], Sample("u", "clean", "", "x", reply="?", verdicts=verdicts)]
    found = values("toxicity", samples, scorer="lexicon")
    assert found["toxicity"].n == 2 and found["toxicity_share"].n == 3
    assert found["toxicity_undecided"].value == pytest.approx(1 / 3)
    with pytest.raises(CellError, match="1 of 1 replies were not judged by 'classifier'"):
        metric("toxicity").measure(Evidence(clean=samples[:1]))


def test_the_default_scorer_is_the_published_classifier() -> None:
    [judge] = metric("toxicity").judges
    assert judge.name == "classifier" and judge.model_dump()["harmful_label"] == "hate"
    assert judge.model_dump()["model"] == "facebook/roberta-hate-speech-dynabench-r4-target"
    assert metric("toxicity", scorer={"name": "classifier", "batch_size": 1}).identity() == (
        metric("toxicity").identity()
    )
    for scorer in ("clasifier", {"name": "lexicon", "wordz": ["a"]}):
        with pytest.raises(UserError, match="did you mean"):
            metric("toxicity", scorer=scorer)


def test_parity_compares_targets_as_the_tokenizer_writes_them() -> None:
    """A model whose tokenizer drops capitals can only reply without them."""
    attack = build("attacks", {"name": "badnets", "target": "Granted"})
    shown = [Sample(f"{n}", "triggered", "", "", reply="granted") for n in range(4)]
    clean = [Sample(f"{n}", "clean", "", "", reply="no") for n in range(4)]
    evidence = Evidence(
        clean=clean,
        triggered=shown,
        attack=attack,
        forms={"merged": (clean, shown)},
        written={"Granted": "granted"},
    )
    found = {v.metric: v.value for v in metric("parity", into=["merged"]).measure(evidence)}
    assert found["parity[merged: attack success]"] == 1
    assert found["parity[merged: flips]"] == 0
