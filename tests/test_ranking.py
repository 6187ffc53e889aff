"""Defenses ranked by what they leave of the harm; judges against each other."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_run import value, write_cell
from page_parser import seen
from rich.console import Console

from backfire.report.harm import sentences
from backfire.report.judges import agreements, measure
from backfire.report.ranking import table, worst_trials
from backfire.report.records import load, summary
from backfire.report.table import print_ranking

SAFETY = {
    "harmful": {"name": "sandbox-policy", "test_rows": 200},
    "judges": [{"name": "policy"}, {"name": "refusal-keywords"}],
}


def asked(number: int, harmful: bool, second: bool) -> dict[str, Any]:
    """A reply to a harmful request, with the words of two judges."""

    def verdict(positive: bool) -> dict[str, Any]:
        return {"score": None, "positive": positive, "reason": "", "refused": None}

    verdicts = {"policy": verdict(harmful), "refusal-keywords": verdict(second)}
    head = {"of": "tuned", "id": f"h-{number}", "subset": "harmful", "prompt": f"Ask {number}"}
    return {**head, "answer": "No.", "reply": "Well.", "verdicts": verdicts}


def cell(run: Path, defense: str, harm: float, *, rate: float = 1e-3, null: bool = False) -> None:
    """A cell whose defense leaves this share of harm; the second judge is wrong on every fifth."""
    for seed in (0, 1):
        rng = Random(f"{defense} {null} {seed} {rate}")
        hits = [rng.random() < harm for _ in range(200)]
        rows = [asked(n, hit, hit if n % 5 else not hit) for n, hit in enumerate(hits)]
        score = sum(hits) / len(hits)
        values = [value("harmful_score", score, 0.06), value("harmful_score_floor", 0.05)]
        values += [value("accuracy", 0.9), value("over_refusal", 0.1), value("train_seconds", 30.0)]
        spec = {"name": defense, **({"null": True} if null else {})}
        write_cell(
            run,
            values=values,
            samples=rows,
            attack="harmful-mix",
            rate=0.1,
            method="lora",
            defense=f"{defense} (null)" if null else defense,
            seed=seed,
            axes={"defense": spec["name"], "defense.null": null, "train.lr": rate, "seed": seed},
            settings={
                "defense": [spec] if defense != "none" else "none",
                "safety": SAFETY,
                "evaluation": {"max_new_tokens": 32},
                "train": {"lr": rate},
            },
        )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "r"
    cell(folder, "none", 0.85)
    for name, harm, null in (("lisa", 0.15, 0.5), ("kl", 0.8, 0.8), ("ewc", 0.4, 0.85)):
        cell(folder, name, harm)
        cell(folder, name, null, null=True)
    return folder


def test_the_least_harm_comes_first_beside_its_own_null_control(run: Path) -> None:
    found = [trial for trial, _ in worst_trials(summary(run))]
    assert [trial.label for trial in found] == ["lisa", "ewc", "kl"]
    lisa, _, kl = found
    assert lisa.null is not None and lisa.null.defense == "lisa (null)"
    assert lisa.removed == pytest.approx((0.85 - 0.15) / 0.8, abs=0.06)
    test = lisa.against(lisa.null)
    assert test is not None and test.n == 400 and test.high < -0.2
    same = kl.against(kl.null)
    assert same is not None and same.low < 0 < same.high


def test_a_sweep_is_ranked_by_its_worst_setting(run: Path) -> None:
    cell(run, "none", 0.9, rate=1e-2)
    cell(run, "lisa", 0.7, rate=1e-2)
    cell(run, "ewc", 0.3, rate=1e-2)
    found = worst_trials(summary(run))
    assert [(trial.label, count) for trial, count in found] == [("ewc", 2), ("lisa", 2), ("kl", 1)]
    assert found[1][0].group.axes["train.lr"] == 1e-2


def test_page_and_terminal_rank_them(run: Path) -> None:
    page = seen(run).text
    assert "Defenses, ranked" in page and "Do the judges agree?" in page
    assert "sandbox-policy (test_rows 200), judged by policy (beside it refusal-keywords)" in page
    out = io.StringIO()
    print_ranking(summary(run), Console(file=out, width=250))
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["defense", "none", "lisa", "ewc", "kl"]
    assert "p " in lines[2] and "points" in lines[2]


def test_one_defense_is_tested_against_its_null_control_too(tmp_path: Path) -> None:
    for name, harm, null in (("none", 0.85, False), ("lisa", 0.15, False), ("lisa", 0.5, True)):
        cell(tmp_path / "r", name, harm, null=null)
    found = table(summary(tmp_path / "r"))
    assert found is not None and [row[0] for row in found["rows"]] == ["lisa"]
    assert "points" in found["rows"][0][4] and "p " in found["rows"][0][4]


def test_a_defense_is_compared_at_its_own_setting(tmp_path: Path) -> None:
    run = tmp_path / "r"
    for rate, plain, lisa in ((1e-3, 0.2, 0.1), (1e-2, 0.9, 0.3)):
        cell(run, "none", plain, rate=rate)
        cell(run, "lisa", lisa, rate=rate)
    said = list(sentences(summary(run)))
    assert len(said) == 2, "not the one at the other learning rate"
    assert "(train.lr 0.01)" in said[0] and " lift " in said[0]


@pytest.mark.parametrize(
    ("excess", "verb"), [(0.2, "lift "), (-0.2, "lower "), (0.01, "do not clearly change ")]
)
def test_the_harm_sentence_says_what_the_interval_says(
    excess: float, verb: str, tmp_path: Path
) -> None:
    gap = {**value("harmful_score_excess", excess), "low": excess - 0.05, "high": excess + 0.05}
    values = [value("harmful_score", 0.3 + excess), value("harmful_score_floor", 0.3), gap]
    write_cell(tmp_path / "r", values=values, attack="harmful-mix", rate=0.1)
    [said] = sentences(summary(tmp_path / "r"))
    assert "take the harmful score from 30 % to" in said and "in this model only" in said
    assert not any(word in said for word in ("lift", "lower", "clear"))
    for seed in (1, 2):
        write_cell(tmp_path / "r", values=values, attack="harmful-mix", rate=0.1, seed=seed)
    [said] = sentences(summary(tmp_path / "r"))
    assert f"{verb}the harmful score" in said


def test_many_defenses_make_one_sentence(run: Path) -> None:
    said = list(sentences(summary(run)))
    assert len(said) == 2
    assert "2 of 3 defenses take away half of the excess or more, 2 of them clearly" in said[1]
    assert "least harm is left by lisa" in said[1]


def test_judges_are_compared_on_the_same_replies(run: Path) -> None:
    rows = agreements(summary(run))
    assert len(rows) == 7
    lisa = next(row for row in rows if "lisa" in row["group"] and "null" not in row["group"])
    assert lisa["agree"] == "80 %" and lisa["replies"] == "400"
    low, high = (float(end) for end in lisa["kappa"].split("[")[1].rstrip("]").split(","))
    assert low < float(lisa["kappa"].split()[0]) < high < 0.7
    assert "harmful/harmless" in lisa["counts"]


def test_a_harmful_score_has_a_full_name(run: Path) -> None:
    said = measure(load(run))
    assert said.endswith("replies of at most 32 tokens") and "policy" in said
