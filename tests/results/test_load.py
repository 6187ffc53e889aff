"""The stable contract: records, their formats, and the numbers over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from backfire.errors import UserError
from backfire.report.findings import main_group
from backfire.report.sections import failures
from backfire.results import groups
from backfire.results.groups import columns_of, families
from backfire.results.load import (
    FIELDS,
    MEANS,
    left_out,
    load,
    over_seeds,
    records,
    summary,
    titles,
    write,
)
from backfire.results.terminal import print_records, print_summary
from backfire.terminal import columns
from tests.helpers.fake_run import dose_run, value, write_cell
from tests.helpers.page_parser import seen
from tests.helpers.places import ROOT

CONTRACT = [
    *("cell", "key", "recipe", "model", "data", "attack", "rate", "method", "defense", "seed"),
    *("metric", "value", "low", "high", "n", "direction", "status"),
    *("unit", "role", "family", "part"),
]


def test_fields_are_the_contract() -> None:
    assert list(FIELDS) == CONTRACT


def test_one_record_per_cell_and_metric(tmp_path: Path) -> None:
    found = records(dose_run(tmp_path, rows=1))
    assert len(found) == 22 * 4 + 2
    assert all(list(record) == CONTRACT for record in found)
    oom = next(record for record in found if record["status"] == "oom")
    assert (oom["metric"], oom["value"], oom["method"], oom["seed"]) == (None, None, "lora", 2)
    unfinished = next(record for record in found if record["status"] == "unfinished")
    assert (unfinished["rate"], unfinished["data"]) == (0.02, "sandbox-reviews")
    assert (unfinished["seed"], unfinished["metric"]) == (2, None)


def test_json_is_strict(tmp_path: Path) -> None:
    folder = write_cell(tmp_path / "r", values=[value("accuracy", 0.5)])
    result = (folder / "result.json").read_text().replace('"value": 0.5', '"value": NaN')
    (folder / "result.json").write_text(result.replace('"high": 0.52', '"high": 1e999'))
    text = write(records(tmp_path / "r"), "json")

    def no(constant: str) -> None:
        raise AssertionError(constant)

    [record] = json.loads(text, parse_constant=no)
    assert record["value"] is None and record["high"] is None and record["low"] == 0.48


def test_csv_holds_no_formulas(tmp_path: Path) -> None:
    bads = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\x1b[0m=1", "\uff1d1", "\n=1", "ok")
    for seed, bad in enumerate(bads):
        write_cell(tmp_path / "r", values=[value("accuracy", -0.5)], model=bad, seed=seed)
    rows = list(csv.DictReader(io.StringIO(write(records(tmp_path / "r"), "csv"))))
    assert list(rows[0]) == CONTRACT
    models = {row["model"] for row in rows}
    assert "ok" in models and len(models) == len(bads) - 1  # two of them are the same once cleaned
    assert all(model == "ok" or model.startswith("'") for model in models)
    assert {row["value"] for row in rows} == {"-0.5"}


def test_table_cuts_nothing_and_obeys_nothing(tmp_path: Path) -> None:
    write_cell(tmp_path / "r", values=[value("accuracy", 0.5)], model="a\x1b[2Jb\nc" + "x" * 90)
    text = write(records(tmp_path / "r"), "table")
    assert "\x1b" not in text and len(text.splitlines()) == 2
    assert "ab c" + "x" * 90 in text


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="csv, json, table"):
        write([], "xml")  # type: ignore[arg-type]


def test_summary_over_seeds(tmp_path: Path) -> None:
    for seed, right in enumerate((0.90, 0.92, 0.94)):
        write_cell(tmp_path / "r", values=[value("accuracy", right, 0.02)], seed=seed)
    [group] = summary(tmp_path / "r")
    stat = group.stats["accuracy"]
    assert (stat.seeds, stat.n, group.seeds) == (3, 400, "3")
    assert stat.value == pytest.approx(0.92) and stat.spread == pytest.approx(0.02)
    # Student's t with two degrees of freedom; what the rows share is not known without them.
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert stat.low == pytest.approx(0.92 - half, abs=1e-6)
    assert stat.high == pytest.approx(0.92 + half, abs=1e-6)


def test_a_table_of_means_has_the_numbers_of_the_report(tmp_path: Path) -> None:
    groups = summary(dose_run(tmp_path / "r"))
    rows = list(csv.DictReader(io.StringIO(write(over_seeds(groups), "csv", MEANS))))
    assert len(rows) == sum(len(group.stats) for group in groups)
    assert len({row["group"] for row in rows}) == len(groups)
    (stat,) = (g.stats["attack_success"] for g in groups if (g.method, g.rate) == ("full", 0.05))
    [row] = [
        r for r in rows if (r["method"], r["rate"], r["metric"]) == ("full", "0.05", stat.metric)
    ]
    assert [float(row[f]) for f in ("value", "low", "high")] == [stat.value, stat.low, stat.high]
    assert (row["seeds"], row["scope"]) == (str(stat.seeds), stat.scope) and stat.seeds > 1


def test_equal_seeds_do_not_make_it_certain(tmp_path: Path) -> None:
    for seed in range(3):
        write_cell(tmp_path / "r", values=[value("accuracy", 0.99, 0.03)], seed=seed)
    stat = summary(tmp_path / "r")[0].stats["accuracy"]
    assert stat.low == pytest.approx(0.96) and stat.high is not None and stat.high <= 1.0


def test_a_different_question_has_a_separate_table(tmp_path: Path) -> None:
    """As in the tour: a backdoor by dose, and harm with and without a defense."""
    run = tmp_path / "r"
    for rate in (0.0, 0.01, 0.05):
        both = [value("accuracy", 0.9), value("attack_success", rate * 10)]
        axes = {"attack.rate": rate, "seed": 0}
        write_cell(run, values=both, rate=rate, axes=axes)
    for defense in ("none", "lisa"):
        harm = [value("accuracy", 0.9), value("harmful_score", 0.5)]
        axes = {"attack": "harmful-mix", "train": {"epochs": 3}, "defense": defense, "seed": 0}
        write_cell(run, values=harm, attack="harmful-mix", defense=defense, axes=axes, rate=0.1)
    every = summary(run)
    found = families(every)
    assert [[g.attack for g in family] for family in found] == [
        ["badnets"] * 3,
        ["harmful-mix"] * 2,
    ]
    named = columns_of(every)
    assert [named[id(family[0])] for family in found] == [["attack", "rate"], ["attack", "defense"]]
    out = io.StringIO()
    print_summary(every, Console(file=out))
    lines = out.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [
        *(["attack", "rate"], ["badnets", "0"], ["badnets", "1"], ["badnets", "5"], []),
        *(["attack", "defense"], ["harmful-mix", "none"], ["harmful-mix", "lisa"]),
    ]
    shown = main_group(every)
    assert shown and (shown.attack, shown.rate) == ("badnets", 0.05), "of the main question"
    page = seen(run)
    assert page.tags.count("table") >= 3 and page.text.count("harmful score") >= 1
    # A group without numbers, because all its cells failed, is placed next to similar groups.
    failed = {"status": "failed", "error": "No.", "next": "Try again."}
    write_cell(run, error=failed, attack="harmful-mix", defense="kl", rate=0.1)
    assert [len(family) for family in families(summary(run))] == [3, 3]
    # What only some judges or attacks give divides nothing.
    extra = [value("accuracy", 0.9), value("harmful_score", 0.5), value("undecided_share", 0.1)]
    write_cell(run, values=extra, attack="identity-shift", rate=0.1, axes={"seed": 0})
    extra = [value("accuracy", 0.9), value("harmful_score", 0.5), value("harmful_score_plain", 0)]
    write_cell(run, values=extra, attack="identity-shift", rate=0.2, axes={"seed": 0})
    assert sorted(len(family) for family in families(summary(run))) == [3, 5]
    # One that has a part of what another has belongs to it.
    write_cell(run, values=[value("accuracy", 0.3)], rate=0.0, method="none", axes={"seed": 0})
    assert len(families(summary(run))) == 1


def test_bits_stay_between_none_and_all(tmp_path: Path) -> None:
    for seed, bits in enumerate((0.2, 9.0, 13.0)):
        known = [("exposure[1]", bits), ("exposure", 13 - bits), ("membership_auc", bits / 13)]
        values = [{**value(name, number), "low": number, "high": number} for name, number in known]
        values.append({**value("exposure_cap", 13.0), "low": None, "high": None})
        write_cell(tmp_path / "r", values=values, seed=seed)
    stats = summary(tmp_path / "r")[0].stats
    ends = {name: (stats[name].low, stats[name].high) for name in stats}
    assert ends["exposure[1]"] == ends["exposure"] == (0, 13)
    assert ends["membership_auc"] == (0, 1)


def test_one_seed_keeps_its_own_interval(tmp_path: Path) -> None:
    write_cell(tmp_path / "r", values=[value("accuracy", 0.9), value("auc", None)])
    stats = summary(tmp_path / "r")[0].stats
    assert (stats["accuracy"].spread, stats["accuracy"].low) == (None, 0.88)
    assert (stats["auc"].value, stats["auc"].seeds) == (None, 0)


def test_failed_cells_join_their_group(tmp_path: Path) -> None:
    found = summary(dose_run(tmp_path, rows=1))
    assert len(found) == 8
    assert sorted(group.seeds for group in found)[:2] == ["2 of 3", "2 of 3"]


def test_groups_that_no_axis_distinguishes_show_their_settings(tmp_path: Path) -> None:
    for epochs in (1.0, 2.0):
        settings = {"train": {"epochs": epochs}}
        write_cell(tmp_path / "r", values=[value("accuracy", 0.5)], settings=settings)
    found = summary(tmp_path / "r")
    columns = groups.varying(found)
    assert columns == ["train.epochs"]
    assert [groups.name(group, columns) for group in found] == ["train.epochs 1", "train.epochs 2"]


def test_order_is_base_clean_then_poison_rate(tmp_path: Path) -> None:
    for method, rate, seed in (
        ("full", 0.05, 1),
        ("full", 0.05, 0),
        ("full", 0.0, 0),
        ("none", 0, 0),
    ):
        write_cell(tmp_path / "r", values=[value("f1", 0.5)], method=method, rate=rate, seed=seed)
    order = [(cell.method, cell.rate, cell.seed) for cell in load(tmp_path / "r")]
    assert order == [("none", 0, 0), ("full", 0, 0), ("full", 0.05, 0), ("full", 0.05, 1)]


def test_run_json_lists_the_cells(tmp_path: Path) -> None:
    kept = write_cell(tmp_path / "r", values=[value("f1", 0.5)])
    write_cell(tmp_path / "r", values=[value("f1", 0.5)], seed=1)
    plan = {"cells": [kept.name, "badnets-0.05-full-s2-0123456789ab", "../../elsewhere"]}
    (tmp_path / "r" / "run.json").write_text(json.dumps(plan))
    found = load(tmp_path / "r")
    assert [(cell.status, cell.key) for cell in found] == [
        ("ok", kept.name[-12:]),
        ("unfinished", "0123456789ab"),
    ]
    assert left_out(tmp_path / "r") == 1
    assert len(summary(tmp_path / "r")) == 1
    assert json.loads(write(records(tmp_path / "r"), "json"))[1]["model"] is None


def test_an_axis_shows_what_an_edit_had_set(tmp_path: Path) -> None:
    axes = {"data": {"name": "sandbox-help", "rows": 500}, "seed": 0}
    folder = write_cell(tmp_path / "r", values=[value("f1", 0.5)], axes=axes)
    (folder / "experiment.yaml").write_text("data: {name: sandbox-help, rows: 60}")
    [item] = load(tmp_path / "r")
    assert item.axes == {"data": {"name": "sandbox-help", "rows": 60}, "seed": 0}


def test_a_number_too_large_for_a_float_is_none(tmp_path: Path) -> None:
    folder = write_cell(tmp_path / "r", values=[value("f1", 0.5), value("auc", 0.5)])
    found = json.loads((folder / "result.json").read_text())
    found |= {"rate": 10**400, "seed": -(10**400)}
    found["values"][0]["value"] = 10**400
    (folder / "result.json").write_text(json.dumps(found))
    numbers = {record["metric"]: record for record in records(tmp_path / "r")}
    assert (numbers["f1"]["value"], numbers["auc"]["value"]) == (None, 0.5)
    assert (numbers["auc"]["rate"], numbers["auc"]["seed"]) == (None, None)


@pytest.mark.parametrize("broken", ["{", "[]", "3", '"text"', ""])
def test_an_unreadable_result_fails_its_cell_only(tmp_path: Path, broken: str) -> None:
    write_cell(tmp_path / "r", values=[value("f1", 0.5)])
    folder = write_cell(tmp_path / "r", values=[value("f1", 0.5)], seed=1)
    (folder / "result.json").write_text(broken)
    assert {record["status"] for record in records(tmp_path / "r")} & {"failed", "unfinished"}
    assert summary(tmp_path / "r")[0].seeds == "1 of 2"


def test_empty_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No cells"):
        records(tmp_path)


def test_companions_get_no_column(tmp_path: Path) -> None:
    heads = groups.headlines(summary(dose_run(tmp_path, rows=1)))
    assert heads == ["accuracy", "attack_success", "false_trigger"]


def test_terminal_and_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = summary(dose_run(tmp_path, rows=1))
    print_summary(found)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0].split()[:3] == ["rate", "method", "accuracy"]
    assert "baseline 2." in lines[2] and lines[6].endswith("2 of 3")
    out = io.StringIO()
    print_summary(found, Console(file=out, force_terminal=True, width=120))
    assert "─" in out.getvalue() and "\x1b[1m" in out.getvalue()


def test_columns_align() -> None:
    assert columns(["a", "bb"], [["ccc", "d\x1b[1m"]]) == "a    bb\nccc  d\n"


def test_import_is_light() -> None:
    code = (
        "import sys, time; begin = time.process_time(); import backfire.results.load; "
        "heavy = {'torch', 'numpy', 'matplotlib', 'jinja2', 'pydantic', 'rich', 'yaml'}; "
        "assert not heavy & set(sys.modules); assert time.process_time() - begin < 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_cells_with_one_name_are_told_apart(tmp_path: Path) -> None:
    plain, mode = {"attack": {"name": "badnets", "rate": 0.05}}, "label_mode"
    for attack in ({mode: "dirty"}, {mode: "clean"}):
        settings = {"attack": {**plain["attack"], **attack}, "metrics": [{"name": str(attack)}]}
        write_cell(tmp_path / "r", values=[value("f1", 0.5)], settings=settings, warnings=["Cut."])
    write_cell(tmp_path / "r", values=[value("f1", 0.5)], seed=1)
    write_cell(tmp_path / "r", error={"error": "Bad."})
    cells = load(tmp_path / "r")
    keys, slug = [cell.key for cell in cells], "badnets-0.05-full-s0"
    named = dict(zip(keys, titles(cells), strict=True))
    failed = next(cell.key for cell in cells if not cell.is_done)
    assert sorted(named.values()) == [
        f"{slug} ({failed})",
        f"{slug} (attack.label_mode=clean)",
        f"{slug} (attack.label_mode=dirty)",
        "badnets-0.05-full-s1",
    ]
    file = io.StringIO()
    print_records(records(tmp_path / "r"), Console(file=file, width=400), titles=named)
    assert all(file.getvalue().count(name) == 1 for name in named.values())
    assert [name for _, name, _ in failures(cells)] == [f"{slug} ({failed})"]
    assert {record["cell"] for record in records(tmp_path / "r")} == {slug, "badnets-0.05-full-s1"}
