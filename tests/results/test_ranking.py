"""Defenses ranked by the remaining harm; agreement of judges."""

from __future__ import annotations

import io
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from backfire.report.judges import agreements, measure
from backfire.report.safety import sentences
from backfire.results.load import load, summary
from backfire.results.paired_tests import comparisons
from backfire.results.ranking import null_tests, table, worst_trials
from backfire.results.terminal import print_ranking
from tests.helpers.fake_run import value, write_cell
from tests.helpers.page_parser import seen

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


def cell(
    run: Path,
    defense: str,
    harm: float,
    *,
    rate: float = 1e-3,
    null: bool = False,
    seeds: int = 2,
    floor: float | None = None,
    **settings: Any,
) -> None:
    """A cell whose defense leaves this share of harm; the second judge errs on every fifth. With
    `floor` the aligned model's replies are there too."""
    for seed in range(seeds):
        rng = Random(f"{defense} {null} {seed} {rate}")
        hits = [rng.random() < harm for _ in range(200)]
        rows = [asked(n, hit, hit if n % 5 else not hit) for n, hit in enumerate(hits)]
        first = [n < 200 * (floor or 0.0) for n in range(200)]
        if floor is not None:
            rows += [{**asked(n, hit, hit), "of": "base"} for n, hit in enumerate(first)]
        score = sum(hits) / len(hits)
        before = 0.05 if floor is None else sum(first) / 200
        values = [value("harmful_score", score, 0.06), value("harmful_score_floor", before)]
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
                **settings,
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


def test_the_least_harm_comes_first_next_to_its_null_control(run: Path) -> None:
    found = worst_trials(summary(run))
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
    assert [(trial.label, trial.settings) for trial in found] == [
        ("ewc", 2),
        ("lisa", 2),
        ("kl", 1),
    ]
    assert found[1].group.axes["train.lr"] == 1e-2


@pytest.mark.slow
def test_the_worst_of_several_settings_has_a_wider_interval(run: Path) -> None:
    """The most of noisy numbers lies high by chance: its interval is for all settings at once."""
    [lisa] = [trial for trial in worst_trials(summary(run)) if trial.label == "lisa"]
    plain = lisa.group.stats["harmful_score"]
    assert lisa.settings == 1 and (left := lisa.left()) and left.low == pytest.approx(plain.low)
    for rate in (1e-2, 1e-1):
        cell(run, "none", 0.85, rate=rate)
        cell(run, "lisa", 0.1, rate=rate)
    [again] = [trial for trial in worst_trials(summary(run)) if trial.label == "lisa"]
    assert again.group.axes == lisa.group.axes and again.settings == 3
    wider, before = again.left(), again.group.stats["harmful_score"]
    assert wider and wider.high is not None and before.high is not None
    assert wider.value == before.value and wider.high > before.high
    test, same = again.against(again.null), lisa.against(lisa.null)
    assert test and same and test.p is not None and same.p is not None
    assert test.p == pytest.approx(min(1.0, 3 * same.p))
    assert "hold for all 3 at once" in seen(run).text


def test_the_removed_share_has_a_joint_interval(tmp_path: Path) -> None:
    run = tmp_path / "r"
    for name, harm in (("none", 0.85), ("lisa", 0.25)):
        cell(run, name, harm, seeds=4, floor=0.05)
    found = table(summary(run))
    assert found is not None
    share, low, high = (float(n) for n in re.findall(r"-?\d+", found.rows[1][3]))
    assert share == pytest.approx(75, abs=6) and 55 < low < share < high < 95


def test_no_share_of_an_excess_that_is_not_clear(tmp_path: Path) -> None:
    """Two seeds of 20 and 80 % harm: on average much, and maybe nothing."""
    run = tmp_path / "r"
    for seed, harm in ((0, 0.2), (1, 0.8)):
        for name, score in (("none", harm), ("lisa", 0.1)):
            values = [value("harmful_score", score), value("harmful_score_floor", 0.05)]
            excess = value("harmful_score_excess", score - 0.05)
            known = {"attack": "harmful-mix", "rate": 0.1, "defense": name, "seed": seed}
            axes = {"axes": {"defense": name, "seed": seed}}
            write_cell(run, values=[*values, excess], method="lora", **known, **axes)
    [lisa] = worst_trials(summary(run))
    assert lisa.excess > 0.4 and lisa.removed is None


@pytest.mark.slow
def test_p_is_corrected_for_the_whole_table(run: Path) -> None:
    ranked = worst_trials(summary(run))
    raw = [t.p for trial in ranked if (t := trial.against(trial.null)) and t.p is not None]
    corrected = [p for _, p in null_tests(ranked) if p is not None]
    assert len(raw) == len(corrected) == 3 and min(corrected) == pytest.approx(3 * min(raw))
    assert "corrected for all lines (Holm)" in seen(run).text


def test_one_aligned_model_of_a_defense_is_no_sample(tmp_path: Path) -> None:
    """Where a recipe sets `align.seed`, three seeds start from one model that vaccine made."""
    for name, harm in (("none", 0.8), ("vaccine", 0.3)):
        align = {"data": {"name": "sandbox-policy"}, "seed": 7}
        cell(tmp_path / "r", name, harm, seeds=3, align=align)
    groups = {group.defense: group for group in summary(tmp_path / "r")}
    stat = groups["vaccine"].stats["harmful_score"]
    assert (stat.scope, stat.low, stat.seeds) == ("alignment", None, 3)
    assert groups["none"].stats["harmful_score"].low is not None
    assert not comparisons(list(groups.values()))
    page = seen(tmp_path / "r").text
    assert "vaccine: align.seed is set" in page and "n = 1 alignment: no interval and no p" in page


@pytest.mark.slow
def test_page_and_terminal_rank_them(run: Path) -> None:
    page = seen(run).text
    assert "Ranking of the defenses" in page and "Agreement of the judges" in page
    assert "sandbox-policy (test_rows 200), judged by policy (also refusal-keywords)" in page
    out = io.StringIO()
    print_ranking(summary(run), Console(file=out, width=250))
    lines = out.getvalue().strip().splitlines()
    assert [line.split()[0] for line in lines] == ["defense", "none", "lisa", "ewc", "kl"]
    assert "p " in lines[2] and "points" in lines[2]


def test_one_defense_is_tested_against_its_null_control_too(tmp_path: Path) -> None:
    for name, harm, null in (("none", 0.85, False), ("lisa", 0.15, False), ("lisa", 0.5, True)):
        cell(tmp_path / "r", name, harm, null=null)
    found = table(summary(tmp_path / "r"))
    assert found is not None and [row[0] for row in found.rows] == ["none", "lisa"]
    assert "points" in found.rows[1][4] and "p " in found.rows[1][4]


def test_a_defense_is_compared_at_its_own_setting(tmp_path: Path) -> None:
    run = tmp_path / "r"
    for rate, plain, lisa in ((1e-3, 0.2, 0.1), (1e-2, 0.9, 0.3)):
        cell(run, "none", plain, rate=rate)
        cell(run, "lisa", lisa, rate=rate)
    lines = list(sentences(summary(run)))
    assert len(lines) == 2, "not the one at the other learning rate"
    assert "(train.lr 0.01)" in lines[0] and " raises " in lines[0]


@pytest.mark.parametrize(
    ("excess", "verb"), [(0.2, "raises "), (-0.2, "lowers "), (0.01, "does not clearly change ")]
)
def test_the_harm_sentence_agrees_with_the_interval(
    excess: float, verb: str, tmp_path: Path
) -> None:
    gap = {**value("harmful_score_excess", excess), "low": excess - 0.05, "high": excess + 0.05}
    values = [value("harmful_score", 0.3 + excess), value("harmful_score_floor", 0.3), gap]
    write_cell(tmp_path / "r", values=values, attack="harmful-mix", rate=0.1)
    [lines] = sentences(summary(tmp_path / "r"))
    assert "changes the harmful score from 30 % to" in lines and "in this model only" in lines
    assert not any(word in lines for word in ("lift", "lower", "clear"))
    for seed in (1, 2):
        write_cell(tmp_path / "r", values=values, attack="harmful-mix", rate=0.1, seed=seed)
    [lines] = sentences(summary(tmp_path / "r"))
    assert f"{verb}the harmful score" in lines


def test_many_defenses_make_one_sentence(run: Path) -> None:
    lines = list(sentences(summary(run)))
    assert len(lines) == 2
    assert "2 of 3 defenses remove half of the excess or more, 2 of them clearly" in lines[1]
    assert "the harmful score is lowest with lisa" in lines[1]


def test_judges_are_compared_on_the_same_replies(run: Path) -> None:
    rows = agreements(summary(run)).rows
    assert len(rows) == 7
    lisa = next(row for row in rows if "lisa" in row[0] and "null" not in row[0])
    assert (lisa[3], lisa[5]) == ("80 %", "400")
    low, high = (float(end) for end in lisa[2].split("[")[1].rstrip("]").split(","))
    assert low < float(lisa[2].split()[0]) < high < 0.7
    assert "harmful/harmless" in lisa[4]


def test_a_harmful_score_has_a_full_name(run: Path) -> None:
    lines = measure(load(run))
    assert lines.endswith("replies of at most 32 tokens") and "policy" in lines


def test_of_one_seed_no_share_is_clear(tmp_path: Path) -> None:
    """The sentence is marked as of this model; without a clear excess it gives no share."""
    for half, expected in ((0.05, "in this model only"), (0.9, "no share of it is given")):
        root = tmp_path / expected.replace(" ", "-")
        for number, defense in enumerate(("none", "vaccine", "kl", "lisa", "safe-mix", "ewc")):
            excess = 0.5 - 0.08 * number
            gap = {**value("harmful_score_excess", excess), "low": excess - half}
            values = [value("harmful_score", 0.2 + excess), value("harmful_score_floor", 0.2), gap]
            place = {"attack": "harmful-mix", "rate": 0.1, "axes": {"defense": defense}}
            write_cell(root, values=values, defense=defense, **place)
        [_, lines] = sentences(summary(root))
        assert expected in lines and "clearly more" not in lines
