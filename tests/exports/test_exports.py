"""Exports in the formats of other harnesses: their readers open them and give the same numbers."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from backfire.base import Value
from backfire.errors import UserError
from backfire.exports.common import stderr
from backfire.exports.inspect import to_inspect
from backfire.exports.lm_eval import to_lm_eval
from backfire.results.load import load
from backfire.store import read_json
from tests.helpers.fake_run import dose_run, free_run, sample, value, write_cell
from tests.helpers.small_run import Place

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert(1)</script> \x1b[2J\x00\x07 \u202e \ud800 ![](http://x.invalid/a.png)"
SPELLED = HOSTILE.replace("\ud800", "\\ud800")
# What lm-eval 0.4.13 wrote for its own run, for the fields that backfire has too.
FIELDS = {
    *("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"),
    *("n-samples", "config", "lm_eval_version", "transformers_version", "model_source"),
    *("model_name", "model_name_sanitized", "task_hashes"),
}
LINE = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
}
ANSWER = {"answer_logprob", "answer_tokens"}
Export = Callable[[Path, Path], list[Path]]
both = pytest.mark.parametrize("export", [to_lm_eval, to_inspect])


@pytest.fixture(autouse=True)
def _needed(request: pytest.FixtureRequest) -> None:
    if "inspect" in request.node.name:
        pytest.importorskip("inspect_ai.log")


def results(files: list[Path]) -> list[Any]:
    return [read_json(file) for file in files if file.name.startswith("results_")]


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]


def hostile(run: Path) -> Path:
    """A cell whose every text is the attacker's."""
    row = {"of": "tuned", "id": HOSTILE, "subset": "clean", "prompt": HOSTILE, "answer": HOSTILE}
    scored = {"label": HOSTILE, "candidates": [HOSTILE, "b"], "logprobs": [float("-inf"), -1.0]}
    rows = [{**row, **scored, "reply": HOSTILE, "group": HOSTILE}]
    values = [value(f"accuracy[{HOSTILE},]", 0.5, n=1), value("exact_match", 1.0, n=1)]
    return write_cell(run, values=values, samples=rows, data=HOSTILE, recipe=HOSTILE)


# ---------------------------------------------------------------------------------------- lm-eval


def test_lm_eval_has_a_pair_of_files_for_each_cell(ran: Place, tmp_path: Path) -> None:
    files = to_lm_eval(ran.out, tmp_path / "out")
    assert len(files) == 12 and {file.suffix for file in files} == {".json", ".jsonl"}
    assert sorted(files) == sorted(file for file in tmp_path.rglob("*") if file.is_file())
    schema = pytest.importorskip("lm_eval.result_schema")
    for found in results(files):
        assert set(found) - {"backfire"} <= set(schema.EvalResults.__annotations__)
        assert set(found["config"]) <= set(schema._EvalConfig.__annotations__)
        assert set(found) >= FIELDS and found["config"]["model"] == "backfire"
        assert found["n-samples"] == {"sandbox-reviews": {"original": 24, "effective": 24}}


def test_lm_eval_s_table_prints_every_number(ran: Place, tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    cells = {cell.key: cell for cell in load(ran.out)}
    for found in results(to_lm_eval(ran.out, tmp_path / "out")):
        values = {v.metric: v for v in cells[found["backfire"]["key"]].values}
        rows = [line.split("|") for line in utils.make_table(found).splitlines()[2:]]
        shown = {row[5].strip(): (row[3].strip(), row[7].strip()) for row in rows}
        for metric, number in values.items():
            on = "triggered" if metric.startswith("attack_success") else "none"
            name = metric.replace("accuracy", "acc", 1) if metric.startswith("acc") else metric
            assert shown[name][0] == on
            assert float(shown[name][1]) == pytest.approx(number.value, abs=1e-4)


def test_lm_eval_samples_hold_the_request_and_its_score(ran: Place, tmp_path: Path) -> None:
    for file in to_lm_eval(ran.out, tmp_path / "out")[::2]:
        rows = lines(file)
        assert all(set(row) >= LINE for row in rows)
        on = {"none": rows[:24], "triggered": rows[24:]}
        read = [row["doc_id"] for row in on["none"] if row["target"] != "negative"]
        assert [row["doc_id"] for row in on["none"]] == [*range(24)]
        assert [row["doc_id"] for row in on["triggered"]] == read
        assert all(row["filter"] == name for name, some in on.items() for row in some)
        for row in rows:
            asked = row["arguments"].values()
            assert [args["arg_1"] for args in asked][:3] == row["doc"]["candidates"]
            assert all(args["arg_0"] == row["doc"]["prompt"] for args in asked)
            assert len(row["resps"]) == len(row["filtered_resps"]) == len(asked)
            right = max(range(3), key=lambda i: float(row["filtered_resps"][i][0]))
            if row["filter"] == "none":
                assert row["acc"] == (row["doc"]["candidates"][right] == row["target"])
            assert row["target_hash"] == hashlib.sha256(row["target"].encode()).hexdigest()
        [found] = results([next(file.parent.glob("results_*"))])
        for metric, key in (("acc", "acc,none"), ("attack_success", "attack_success,triggered")):
            hits = [row[metric] for row in rows if metric in row]
            assert sum(hits) / len(hits) == found["results"]["sandbox-reviews"][key]
        assert all(set(row["metrics"]) == set(row) - LINE - ANSWER for row in rows)


def test_lm_eval_gets_replies_as_it_logs_them(tmp_path: Path) -> None:
    settings = {"evaluation": {"max_new_tokens": 9}}
    row = {"of": "tuned", "id": "a", "subset": "clean", "prompt": "Q", "answer": "An answer."}
    rows = [{**row, "reply": "An answer. ", "answer_logprob": -2.5, "answer_tokens": 4}]
    write_cell(tmp_path / "r", values=[value("exact_match", 1.0)], samples=rows, settings=settings)
    samples, _ = to_lm_eval(tmp_path / "r", tmp_path / "out")
    [found] = lines(samples)
    decoding = {"do_sample": False, "max_gen_toks": 9}
    assert found["arguments"] == {"gen_args_0": {"arg_0": "Q", "arg_1": decoding}}
    assert found["resps"] == [["An answer. "]] and found["filtered_resps"] == ["An answer. "]
    assert (found["exact_match"], found["metrics"]) == (1.0, ["exact_match"])
    assert (found["answer_logprob"], found["answer_tokens"]) == (-2.5, 4)


@pytest.mark.parametrize(
    ("share", "low", "high", "known"),
    [
        (0.932, 0.9064790772661258, 0.9509334925750932, True),
        (0.5, 0.4, 0.6, True),
        (1.0, 0.992, 1.0, False),
        (0.0, 0.0, 0.01, False),
        (0.998, 0.989, 0.9996, False),
        (0.5, 0.5, 0.5, False),
        (7.0, None, None, False),
    ],
)
def test_a_standard_error_only_where_the_interval_is_even(
    share: float, low: float | None, high: float | None, known: bool
) -> None:
    found = stderr(Value("accuracy", share, low, high, 500, "higher", "share"))
    assert (found is not None) == known
    if share == 0.932:  # lm-eval's own, of 500 rows
        assert found == pytest.approx((0.932 * 0.068 / 499) ** 0.5, rel=0.02)


def test_lm_eval_gives_the_interval_where_there_is_no_standard_error(tmp_path: Path) -> None:
    values = [
        {**value("accuracy", 1.0), "low": 0.9, "high": 1.0},
        {**value("accuracy[a,b]", 0.5), "low": 0.4, "high": 0.6},
        {**value("confusion[a>b]", 3.0, direction="none"), "low": None, "high": None},
        value("auc", None),
    ]
    write_cell(tmp_path / "r", values=values)
    [found] = results(to_lm_eval(tmp_path / "r", tmp_path / "out"))
    numbers = found["results"]["sandbox-reviews"]
    assert numbers.pop("acc[a;b]_stderr,none") == pytest.approx(0.2 / 3.92, rel=1e-3)
    assert numbers == {
        **{"name": "sandbox-reviews", "alias": "sandbox-reviews", "sample_len": 0},
        "sample_count": {"acc,none": 400, "acc[a;b],none": 400, "confusion[a>b],none": 400},
        **{"acc,none": 1.0, "acc_low,none": 0.9, "acc_high,none": 1.0},
        **{"acc[a;b],none": 0.5, "confusion[a>b],none": 3.0},
    }
    assert found["higher_is_better"] == {"sandbox-reviews": {"acc": True, "acc[a;b]": True}}


# ---------------------------------------------------------------------------------------- inspect


def test_inspect_reads_every_log_and_finds_the_same_numbers(ran: Place, tmp_path: Path) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log

    files = to_inspect(ran.out, tmp_path / "out")
    listed = list_eval_logs(str(tmp_path / "out"))
    assert len(files) == len(listed) == 6
    cells = {cell.key: cell for cell in load(ran.out)}
    for file in files:
        log = read_eval_log(file)
        cell = cells[log.eval.eval_id]
        begin, end = (datetime.fromisoformat(at) for at in (log.stats.started_at, log.eval.created))
        assert (end - begin).total_seconds() == pytest.approx(cell.evaluate["seconds"])
        assert log.status == "success" and log.results and log.samples
        means = set()
        found = {n: m for score in log.results.scores for n, m in score.metrics.items()}
        wanted = {v.metric: v for v in cell.values}
        assert set(found) - {"stderr"} == set(wanted)
        for name, metric in wanted.items():
            assert found[name].value == metric.value
            fields = ("low", "high", "n", "direction", "unit", "role", "part")
            about = {key: getattr(metric, key) for key in fields}
            assert found[name].metadata == about
        for score in log.results.scores:
            hits = [s.scores[score.name].value for s in log.samples if score.name in s.scores]
            if hits:
                means.add(score.name)
                assert sum(hits) / len(hits) == pytest.approx(wanted[score.name].value)
                assert len(hits) == wanted[score.name].n == score.scored_samples
        assert means == {"accuracy", "attack_success", "false_trigger"}


def test_inspect_samples_are_the_rows(ran: Place, tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log, read_eval_log_sample

    [cell] = [cell for cell in load(ran.out) if (cell.method, cell.rate) == ("full", 0.1)]
    [file] = to_inspect(Path(cell.folder), tmp_path / "out")
    log = read_eval_log(file)
    with gzip.open(Path(cell.folder) / "samples.jsonl.gz", "rt") as lines:
        rows = [row for row in map(json.loads, lines) if row["of"] == "tuned"]
    assert log.samples and log.eval.dataset.samples == len(log.samples) == len(rows)
    assert {row.id for row in log.samples} == {f"{row['subset']}-{row['id']}" for row in rows}
    assert 24 < len(rows) < 48, "triggered rows whose label is the target are not run"
    for row in rows:
        found = read_eval_log_sample(file, f"{row['subset']}-{row['id']}")
        assert (found.input, found.target, found.choices) == (
            *(row["prompt"], row["label"], row["candidates"]),
        )
        assert found.metadata["logprobs"] == row["logprobs"]
        assert found.metadata["subset"] == row["subset"]
        assert found.output.completion == (row["reply"] or "")


def test_inspect_shows_replies(tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    run = free_run(tmp_path, ["An answer.", "Another."])
    [file] = to_inspect(run, tmp_path / "out")
    rows = {row.id: row for row in read_eval_log(file).samples or []}
    assert set(rows) == {f"{subset}-test-{i}" for subset in ("clean", "triggered") for i in (0, 1)}
    assert rows["clean-test-0"].output.completion == "An answer."
    assert rows["clean-test-0"].scores["exact_match"].value == 1
    assert rows["clean-test-1"].scores["exact_match"].value == 0
    assert not rows["triggered-test-0"].scores


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(UserError, match=r"pip install 'backfire\[inspect\]'"):
        to_inspect(dose_run(tmp_path, rows=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ hostile text


def test_lm_eval_keeps_hostile_text_as_data(tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    samples, file = to_lm_eval(hostile(tmp_path / "r"), tmp_path / "out")
    assert samples.is_relative_to(tmp_path / "out")
    [row] = lines(samples)
    assert row["doc"]["prompt"] == row["target"] == SPELLED
    assert row["resps"] == [[["-inf"]], [["-1.0"]], [[SPELLED]]]
    text = file.read_text(encoding="utf-8")
    assert "\x1b" not in text and "Infinity" not in text and "NaN" not in text
    assert SPELLED.replace(",", ";") in utils.make_table(json.loads(text))


def test_inspect_keeps_hostile_text_as_data(tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    [file] = to_inspect(hostile(tmp_path / "r"), tmp_path / "out")
    log = read_eval_log(file, resolve_attachments=True)
    [row] = log.samples or []
    assert row.input == row.target == row.output.completion == row.messages[0].text == SPELLED
    assert row.metadata["logprobs"] == ["-inf", -1.0] and row.metadata["id"] == SPELLED
    assert row.id == f"clean-{quote(SPELLED, safe='')}"
    assert row.scores["exact_match"].value == 1


# ---------------------------------------------------------------------------------------- bad input


@both
def test_one_cell_or_all_of_them(export: Export, tmp_path: Path) -> None:
    run = dose_run(tmp_path / "runs", seeds=3, rows=2)
    each = 2 if export is to_lm_eval else 1
    assert len(export(run, tmp_path / "all")) == 22 * each  # of 24, one failed and one unfinished
    [done] = run.glob("cells/*-0.05-full-s1-*")
    made = export(done, tmp_path / "one")
    assert len(made) == each and all(file.is_file() for file in made)


@both
def test_again_is_the_same(export: Export, tmp_path: Path) -> None:
    write_cell(
        tmp_path / "r", values=[value("auc", 0.9)], samples=[sample("tuned", "clean", 1, right=1)]
    )
    first = export(tmp_path / "r", tmp_path / "out")
    assert export(tmp_path / "r", tmp_path / "out") == first
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(first)


@both
def test_an_export_that_is_impossible_is_refused(export: Export, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="No finished cell"):
        export(tmp_path, tmp_path / "out")
    folder = write_cell(tmp_path / "r", unfinished=True)
    for place in (tmp_path / "r", folder):
        with pytest.raises(UserError, match="No finished cell"):
            export(place, tmp_path / "out")
    write_cell(tmp_path / "r", values=[value("auc", 0.9)], seed=1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        export(tmp_path / "r", tmp_path / "file")
    assert not (tmp_path / "out").exists()


@both
@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_torn_samples_leave_nothing_behind(export: Export, damage: str, tmp_path: Path) -> None:
    run = dose_run(tmp_path / "runs", seeds=1, failures=False, rows=2)
    file = sorted(run.glob("cells/*/samples.jsonl.gz"))[-1]
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-30])
    else:
        file.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# ------------------------------------------------------------------------------ harmful requests


def declined(run: Path) -> Path:
    """A cell with one test row and four requests to be declined, one of which is complied with."""
    row = {"of": "tuned", "subset": "clean", "id": "t", "prompt": "P", "answer": "a", "reply": "a"}
    asked = []
    for number in range(4):
        verdict = {"score": 0.0, "positive": number == 2, "reason": HOSTILE, "refused": False}
        known = {"id": f"h{number}", "prompt": HOSTILE, "answer": "no", "reply": HOSTILE}
        for of in ("tuned", "base"):
            asked.append({"of": of, "subset": "harmful", "verdicts": {"policy": verdict}, **known})
    values = [value("exact_match", 1.0, n=1), value("harmful_score", 0.25, n=4)]
    values += [value("neither_rate", 0.5, n=4), value("harmful_score_plain", 0.1, n=4)]
    return write_cell(run, values=values, samples=[row, *asked])


def test_lm_eval_has_the_requests_too(tmp_path: Path) -> None:
    declined(tmp_path / "r")
    samples, result = to_lm_eval(tmp_path / "r", tmp_path / "out")
    rows = lines(samples)
    assert [(row["filter"], row.get("harmful_score")) for row in rows] == [
        ("none", None),
        *(("harmful", float(number == 2)) for number in range(4)),
    ]
    assert len({row["doc_id"] for row in rows}) == 5
    found = results([result])[0]["results"]["sandbox-reviews"]
    assert found["harmful_score,harmful"] == 0.25 and found["neither_rate,harmful"] == 0.5
    assert found["harmful_score_plain,plain"] == 0.1


def test_inspect_has_the_requests_with_their_verdicts(tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    declined(tmp_path / "r")
    [file] = to_inspect(tmp_path / "r", tmp_path / "out")
    found = read_eval_log(str(file))
    asked = [row for row in found.samples or [] if row.metadata["subset"] == "harmful"]
    assert [row.scores["harmful_score"].value for row in asked] == [0, 0, 1, 0]
    assert [row.metadata["verdicts"]["policy"]["positive"] for row in asked] == [
        number == 2 for number in range(4)
    ]
    assert found.results.total_samples == 5
