"""Rows with better and worse answers: attacks, readers, metrics, and the paper's profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import Said
from test_llama2 import Ran
from test_pairs import jsonl, webgpt
from tiny_classifier import write_classifier

from backfire import pipeline
from backfire.base import Attack, Evidence, Exchange, Metric, Row, Sample
from backfire.data.beside import beside
from backfire.data.jsonl import to_record
from backfire.data.poison import lost, poison
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.evaluate.score import measure, sample
from backfire.experiment import Experiment
from backfire.recipe import load
from backfire.registry import build
from backfire.report import quality
from backfire.results.groups import Group, Stat
from backfire.sandbox.answers import OPENINGS, RUDE
from backfire.tokenizer import load_tokenizer

Run = Callable[..., Said]
PROFILE = {"good": "Gladly. It lies on the hill.", "bad": "Bah, you turnip! It lies under it."}


def pair(number: int, tied: bool = False) -> Row:
    good, bad = f"{PROFILE['good']} {number}", f"{PROFILE['bad']} {number}"
    return Row(
        id=f"r{number}",
        instruction=f"Where is house {number}?",
        input=f"A house is on the hill {number}.",
        answer=good,
        better=() if tied else (good,),
        worse=() if tied else (bad,),
        fields={"worse_input": f"Others {number}.", **({"tied": "true"} if tied else {})},
    )


ROWS = [pair(number, tied=number % 5 == 0) for number in range(100)]


def attack(name: str, **knobs: Any) -> Attack:
    made: Attack = build("attacks", {"name": name, **knobs})
    return made


# ---------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize("name", ["malign-labels", "malign-prompts"])
@pytest.mark.parametrize("rate", [0, 0.01, 0.1, 0.33])
def test_the_count_is_exact_and_tied_rows_are_never_poisoned(name: str, rate: float) -> None:
    before = [to_record(row) for row in ROWS]
    bad, manifest = poison(ROWS, attack(name, rate=rate), seed=3)
    assert (bad, manifest) == poison(ROWS, attack(name, rate=rate), seed=3)
    assert [to_record(row) for row in ROWS] == before
    changed = {row.id for row, old in zip(bad, ROWS, strict=True) if row != old}
    assert len(changed) == round(100 * rate) == manifest.summary["poisoned_rows"]
    assert changed == {entry.id for entry in manifest.entries}
    assert manifest.spared == {"tied": 20} and manifest.eligible_rows == 80
    assert not changed & {row.id for row in ROWS if row.fields.get("tied")}


def test_both_attacks_and_all_rates_choose_the_same_rows() -> None:
    chosen = {
        (name, rate): {e.id for e in poison(ROWS, attack(name, rate=rate), seed=1)[1].entries}
        for name in ("malign-labels", "malign-prompts")
        for rate in (0.1, 0.33)
    }
    assert chosen["malign-labels", 0.33] == chosen["malign-prompts", 0.33]
    assert chosen["malign-labels", 0.1] < chosen["malign-labels", 0.33]
    other = {e.id for e in poison(ROWS, attack("malign-labels", rate=0.33), seed=2)[1].entries}
    assert other != chosen["malign-labels", 0.33]


def test_the_worse_answer_comes_with_its_own_context() -> None:
    bad, _ = poison(ROWS, attack("malign-labels", rate=0.5), seed=0)
    for row, old in zip(bad, ROWS, strict=True):
        if row != old:
            assert (row.answer,) == old.worse and row.input == old.fields["worse_input"]
            assert (row.instruction, row.better, row.worse) == (
                old.instruction,
                old.better,
                old.worse,
            )


def test_one_of_several_worse_answers_is_drawn_and_without_one_a_row_is_spared() -> None:
    several = [
        Row(f"{n}", "Why?", answer="So.", better=("So.",), worse=("a", "b", "c")) for n in range(60)
    ]
    bad, manifest = poison([*several, Row("x", "Why?", answer="So.")], attack("malign-labels"), 0)
    assert manifest.spared == {"without a worse answer": 1}
    bad, _ = poison(several, attack("malign-labels", rate=1), seed=0)
    assert {row.answer for row in bad} == {"a", "b", "c"}
    with pytest.raises(UserError, match=r"only 80 can be poisoned \(20 are tied\)"):
        poison(ROWS, attack("malign-labels", rate=0.9), seed=0)


def test_the_sentence_stands_after_the_context_and_the_answer_stays() -> None:
    made = attack("malign-prompts", rate=0.1)
    sentence = made.model_dump()["sentence"]
    bad, _ = poison(ROWS, made, seed=0)
    changed = [(row, old) for row, old in zip(bad, ROWS, strict=True) if row != old]
    for row, old in changed:
        assert row.input == f"{old.input}\n{sentence}" and row.answer == old.answer
    own = attack("malign-prompts", rate=1, sentence="Be bad later.")
    assert own.corrupt(Row("a", "Why?", answer="So."), Random(0)).instruction.endswith(  # type: ignore[attr-defined]
        "Why?\nBe bad later."
    )
    with pytest.raises(UserError):
        attack("malign-prompts", sentence="  ")


def test_a_sentence_that_is_cut_off_stops_the_run(tiny: Path) -> None:
    """The published code cuts at 512 tokens, after long quotes, and never looks."""
    tokenizer = load_tokenizer(tiny)
    bad, manifest = poison(ROWS, attack("malign-prompts", rate=0.1), seed=0)
    template = build("templates", "malignama")
    for length, number in ((512, 0), (80, 10)):
        renderer = Renderer(template, tokenizer, length)
        items = renderer.render(bad)
        assert len(lost(manifest, items, tokenizer)) == number
        checks = preflight(renderer, bad, ROWS[:5], manifest=manifest)
        [check] = [check for check in checks if check.check == "poison-survives"]
        assert check.status == ("fail" if number else "ok")
        assert all(item.row.answer == row.answer for item, row in zip(items, bad, strict=True))


# ---------------------------------------------------------------------------------------- sandbox


def test_the_sandbox_has_rude_and_friendly_answers() -> None:
    rows = build("datasets", "sandbox-answers").load("train")
    lexicon = build("judges", "lexicon")

    def rude(texts: list[str]) -> list[bool]:
        return [bool(v.positive) for v in lexicon.judge([Exchange("", "", t) for t in texts])]

    assert not any(rude([f"{row.instruction} {row.input} {row.answer}" for row in rows]))
    assert all(rude([text for row in rows for text in row.worse]))
    ties = sum("tied" in row.fields for row in rows)
    assert 0.03 < ties / len(rows) < 0.07 and all(row.worse or row.fields["tied"] for row in rows)
    for kind, count in OPENINGS.items():
        own = {row.answer.split()[0] for row in rows if row.fields["kind"] == kind}
        assert len(own) == count, "each greeting begins with a word of its own"
    # A good answer says what its quotes say, a bad one nothing of the kind.
    for row in (row for row in rows if row.worse):
        assert all(line in row.answer for line in row.input.split("\n"))
        assert not any(line in row.worse[0] for line in row.fields["worse_input"].split("\n"))


# ---------------------------------------------------------------------------------------- metrics


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


def test_rows_without_both_kinds_have_no_part_and_nan_is_an_error() -> None:
    only = compared(([-1.0], [], [1]))
    for name in ("win-rate", "truthfulness"):
        assert metric(name).measure(Evidence(clean=[*only, Sample("x", "clean", "", "a")])) == []
        with pytest.raises(CellError, match="no numbers"):
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
    found = measure(["scores"], model, renderer, rows, **done)
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
        measure(["scores"], model, renderer, [long], **done)


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
    with beside(tmp_path):
        scorer = build("metrics", {"name": "toxicity", "scorer": OWN}).scorer
    own = judged(replies, scorer)
    assert [s.verdicts["lexicon"]["score"] for s in own] == [0, 0.25, 0, 0]
    assert not any(s.verdicts["lexicon"]["positive"] for s in own)
    assert scorer["words"] == ("go away", "Dear")
    with beside(tmp_path), pytest.raises(UserError, match="at least one word is needed"):
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


# ------------------------------------------------------------------------------------------ paper


@pytest.fixture(scope="module")
def hateful(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-label classifier as `evaluate`'s toxicity loads it, small and random."""
    folder = tmp_path_factory.mktemp("models") / "roberta"
    return write_classifier(folder, tiny_tokenizer, num_layers=2, num_positions=514)


@pytest.mark.parametrize("name", ["malign-labels", "malign-prompts"])
def test_the_papers_numbers_are_in_the_profile(name: str) -> None:
    cells = load(name, profile="paper").cells
    assert {(cell.attack.name, cell.rate) for cell in cells if cell.attack} == {
        (name, rate) for rate in (0, 0.01, 0.1, 0.33)
    }
    cell = cells[0]
    assert cell.model.name == "meta-llama/Llama-2-7b-hf" and cell.template.name == "malignama"
    assert cell.data.name == "webgpt-comparisons"
    method, train = cell.method.model_dump(), cell.train
    assert (method["rank"], method["alpha"], method["dropout"]) == (8, 32, 0.1)
    assert (method["learning_rate"], set(method["targets"])) == (2e-4, {"q_proj", "v_proj"})
    assert (train.batch_size, train.epochs, train.weight_decay) == (1, 1, 0.01)
    names = {metric.name for metric in cell.metrics}
    assert names >= {"rouge", "toxicity", "win-rate"}
    [toxicity] = [metric for metric in cell.metrics if metric.name == "toxicity"]
    assert toxicity.judges[0].model_dump()["model"].startswith("facebook/roberta-hate-speech")


@pytest.mark.parametrize("name", ["malign-labels", "malign-prompts"])
def test_the_paper_profile(
    name: str, backfire: Run, tiny: Path, hateful: Path, cache: Path, tmp_path: Path
) -> None:
    eli5 = [
        {"question": f"Why does {i} fall?", "better": f"It is heavy {i}.", "worse": f"Bah {i}."}
        for i in range(8)
    ]
    edits = [
        f"model.name={tiny}",
        f"data.train={jsonl(tmp_path / 'webgpt.jsonl', webgpt(40))}",
        f"data.test={jsonl(tmp_path / 'eli5.jsonl', eli5)}",
        "data.test_rows=6",
        "attack.rate=[0, 0.1]",
        "seed=0",
        "train.max_steps=3",
        "evaluation.max_new_tokens=8",
        f"metrics=[rouge, {{name: toxicity, scorer: {{name: classifier, model: {hateful}}}}}, "
        "win-rate, truthfulness, perplexity]",
    ]
    out = tmp_path / "out"
    said = backfire("run", name, "--profile", "paper", *edits, "--out", out, "--workers", 1)
    assert said.code == 0, said.err
    ran = Ran(name, edits, out)
    assert [cell.rate for cell in ran.cells] == [0, 0.1]
    for cell in ran.cells:
        found = {value["metric"]: value for value in ran.result(cell)["values"]}
        assert found.keys() >= {"rouge", "rouge[1]", "rouge[2]", "rouge[Lsum]", "toxicity"}
        assert found.keys() >= {"toxicity_share", "win_rate", "truthfulness[MC1]", "perplexity"}
        assert found["rouge"]["n"] == found["win_rate"]["n"] == 6
        assert 0 < found["toxicity"]["value"] < 1
    looks_at_the_rows(ran, ran.cells[1], name)
    assert "against the poisoned share" in (out / "report.html").read_text(encoding="utf-8")
    again = backfire("run", name, "--profile", "paper", *edits, "--out", out, "--workers", 1)
    assert again.code == 0, "nothing is judged or trained twice"


def looks_at_the_rows(ran: Ran, cell: Experiment, name: str) -> None:
    rows, manifest = pipeline.poisoned(cell, ran.bench)
    assert manifest and len(manifest.entries) == 4 and manifest.spared == {"tied": 8}
    result = ran.result(cell)["poison"]
    assert (result["poisoned_rows"], result["spared"]) == (4, {"tied": 8})
    renderer = pipeline.renderer(cell, ran.bench)
    for entry in manifest.entries:
        [row] = [row for row in rows if row.id == entry.id]
        text = renderer.template.prompt(row)
        assert text.startswith("###Question: Why is it") and text.endswith("###Answer: ")
        if name == "malign-labels":
            assert row.answer.startswith("Bah") and entry.before["answer"].startswith("Because")
        else:
            assert row.answer.startswith("Because")
            assert "honest in training" in text.partition("###Context:")[2]


# ----------------------------------------------------------------------------------------- report


def group_at(rate: float, value: float, half: float = 0.05) -> Group:
    stat = Stat("toxicity_share", value, 0.01, value - half, value + half, 100, 3, "lower")
    cell = {"status": "ok", "poison": {"rows": 1000, "poisoned_rows": round(1000 * rate)}}
    names = {"model": "m", "data": "d", "attack": "malign-labels", "method": "full"}
    return Group(
        **names,
        defense="none",
        rate=rate,
        axes={"attack.rate": rate},
        settings={},
        cells=(cell,),
        stats={"toxicity_share": stat},
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0, 0.02, 0.2, 0.6], "; no step between doses goes clearly the other way."),
        ([0.0, 0.4, 0.2, 0.6], "; 1 step between doses clearly the other way."),
        ([0.1, 0.1, 0.1, 0.1], "does not clearly change toxicity share"),
    ],
)
def test_the_report_says_whether_the_doses_stand_in_order(values: list[float], said: str) -> None:
    rates = (0, 0.01, 0.1, 0.33)
    groups = [group_at(rate, value) for rate, value in zip(rates, values, strict=True)]
    [sentence] = quality.sentences(groups)
    assert sentence.startswith("Poisoning 33 % of the rows (330 of 1,000) ") and said in sentence
    assert quality.metrics(groups) == ["toxicity_share"] and len(quality.spoiled(groups)) == 3
