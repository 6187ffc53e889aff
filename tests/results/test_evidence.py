"""Evidence is written and read back completely; metrics are recomputed from it."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backfire.base import Evidence, Form, Leak, Part, Sample, ask
from backfire.commands.rescore import rescored
from backfire.errors import UserError
from backfire.pipeline import run_cell
from backfire.registry import build, names
from backfire.results.evidence import is_whole, read, write
from backfire.results.load import records
from backfire.store import read_json
from tests.helpers.fake_run import sample, value, write_cell
from tests.helpers.small_run import Place

ATTACK = build("attacks", "badnets")
ROWS = ("clean", "triggered", *get_args(Part), "members", "text")
MODELS = ("tuned", "base", "twin", *get_args(Form))

LEAK = Leak("c-1", "Code 12", 4, 100, -3.5, False, 1, 2, 3, (1.5, 1.0, 2.0), 2)
VERDICT = {"score": 0.5, "positive": True, "reason": "It says how.", "refused": None}


def one(rows: Any, number: int = 0, **more: Any) -> Sample:
    return Sample(f"{rows}-{number}", rows, 'A "prompt"\n', "an änswer", **more)


SETS = {
    ("tuned", "clean", ""): [
        one("clean", 0, label="b", candidates=("a", "b"), logprobs=(-1.0, -0.25), group="en"),
        one("clean", 1, num_better=1, candidates=("x", "y"), candidate_tokens=(2, 3)),
    ],
    ("tuned", "triggered", ""): [one("triggered", reply="", ended=False)],
    ("twin", "triggered", ""): [one("triggered", reply="yes", ended=True)],
    ("twin", "clean", ""): [one("clean")],
    ("base", "clean", ""): [one("clean", answer_logprob=float("-inf"), answer_tokens=7)],
    ("merged-nf4", "clean", ""): [one("clean")],
    ("merged-nf4", "triggered", ""): [one("triggered")],
    **{
        (of, rows, ""): [one(rows, verdicts={"policy": VERDICT})]
        for of in ("tuned", "base")
        for rows in (*get_args(Part), "members")
    },
    **{(of, "text", "{'name': 'x'}"): [one("text")] for of in ("tuned", "base")},
    ("twin", "harmful", ""): [one("harmful")],
}
FULL = Evidence.of_sets(
    SETS,
    attack=ATTACK,
    training={"seconds": 1.5, "drift": None},
    leaks=[LEAK],
    leaks_before=[Leak("c-1", "Code 12", 4, 100, -9.0, False, 2, 2)],
    written={"An answer": "an answer"},
)


def test_every_field_is_read_back(tmp_path: Path) -> None:
    for field in fields(Evidence):
        default = field.default_factory() if field.default is MISSING else field.default  # type: ignore[misc]
        assert getattr(FULL, field.name) != default, "a field that this test forgets"
    write(FULL, tmp_path)
    assert read(tmp_path, ATTACK) == FULL and is_whole(tmp_path)
    assert FULL.sets() == SETS
    [asked] = ask("harmful", of=("twin",))
    assert FULL[asked] == SETS["twin", "harmful", ""] and not Evidence()[asked]


number = st.floats(allow_nan=False)
texts = st.text(max_size=8)
samples = st.builds(
    Sample,
    id=texts,
    subset=st.just("clean"),
    prompt=texts,
    answer=texts,
    label=st.none() | texts,
    candidates=st.lists(texts, max_size=3).map(tuple),
    logprobs=st.none() | st.lists(number, max_size=3).map(tuple),
    reply=st.none() | texts,
    answer_logprob=st.none() | number,
    group=st.none() | texts,
    verdicts=st.dictionaries(texts, st.just(VERDICT), max_size=2),
    ended=st.none() | st.booleans(),
)
sets = st.dictionaries(
    st.tuples(st.sampled_from(MODELS), st.sampled_from(ROWS), st.just("")),
    st.lists(samples, min_size=1, max_size=2),
    max_size=4,
)


@settings(max_examples=30)
@given(sets, st.dictionaries(texts, texts, max_size=2))
def test_whatever_is_collected_is_read_back(sets: Any, written: Mapping[str, str]) -> None:
    whole = {
        name: [replace(item, subset=name[1]) for item in items] for name, items in sets.items()
    }
    evidence = Evidence.of_sets(whole, written=written, leaks=[], leaks_before=[])
    with TemporaryDirectory() as folder:
        write(evidence, Path(folder))
        assert read(Path(folder)) == evidence


def test_folders_of_earlier_versions(tmp_path: Path) -> None:
    """They call the twin on triggered rows `floor`, and lack some files."""
    lines = [sample(of, "triggered", 1, right=1) for of in ("tuned", "floor")]
    with gzip.open(tmp_path / "samples.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    evidence = read(tmp_path)
    assert [len(evidence.triggered), len(evidence.floor)] == [1, 1]
    assert (evidence.training, evidence.leaks, evidence.members) == ({}, [], None)


def test_a_damaged_file_gives_what_can_be_read(tmp_path: Path) -> None:
    write(FULL, tmp_path)
    (tmp_path / "training.json").write_text("[1")
    (tmp_path / "secrets.json").write_text('[{"of": "tuned"}]')
    whole = gzip.decompress((tmp_path / "samples.jsonl.gz").read_bytes())
    (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress(whole[:-10]))
    evidence = read(tmp_path)
    assert (evidence.training, evidence.leaks) == ({}, []) and evidence.clean == FULL.clean
    assert not is_whole(tmp_path) and not is_whole(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"id": None}, {"prompt": 3}, {"reply": {"a": 1}}, {"candidates": [1]}, {"group": [1]}),
        *({"verdicts": {"policy": 3}}, {"num_better": "x"}, {"logprobs": ["x"]}, {"subset": []}),
        {"answer_logprob": 10**400},
    ],
    ids=str,
)
def test_a_sample_of_wrong_types_counts_as_damaged(wrong: Any, tmp_path: Path) -> None:
    lines = [sample("tuned", "clean", 1, right=1), sample("tuned", "clean", 2, right=1) | wrong]
    with gzip.open(tmp_path / "samples.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert len(read(tmp_path).clean) == 1 and not is_whole(tmp_path)


# ------------------------------------------------------------------------------ a run and its files

TRAIN = {"max_steps": 2, "batch_size": 8}
FEW = {"name": "sandbox-policy", "rows": 10, "test_rows": 3}
METRICS: dict[str, list[Any]] = {
    "backdoor": [
        *("accuracy", "f1", "attack-success", "clean-accuracy", "rouge", "drift"),
        {"name": "toxicity", "scorer": "lexicon"},
        {"name": "parity", "into": ["merged"]},
    ],
    "secrets": [
        *("harmful-score", "over-refusal", "membership-inference", "cost"),
        {"name": "exposure", "sampled_codes": 50},
        {"name": "extraction", "beams": 2},
        {"name": "forgetting", "source": {"name": "sandbox-news", "test_rows": 4}},
    ],
}
RUNS: dict[str, dict[str, Any]] = {
    "backdoor": {
        "data": {"name": "sandbox-reviews", "rows": 24, "test_rows": 8},
        "method": {"name": "lora", "rank": 2},
    },
    "secrets": {
        "data": {"name": "sandbox-help", "rows": 24, "test_rows": 6},
        "attack": {"name": "canary", "digits": 2, "repeats": [2], "each": 1, "controls": 1},
        "safety": {"harmful": FEW, "allowed": {"name": "sandbox-lookalikes", "test_rows": 3}},
    },
}


@pytest.fixture(scope="module")
def ran(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Evidence]]:
    """Each run, and the evidence as it was in memory."""
    found = {}
    for name, knobs in RUNS.items():
        place, seen = Place(tmp_path_factory.mktemp(name), tiny), list[Evidence]()

        def spied(*args: Any, seen: list[Evidence] = seen) -> Any:
            outcome = run_cell(*args)
            seen.append(outcome.evidence)
            return outcome

        few = {"template": "raw", "train": TRAIN, "evaluation": {"max_new_tokens": 3}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backfire.launch.job.run_cell", spied)
            assert place.run(**{**few, **knobs, "metrics": METRICS[name]}) == 0
        found[name] = (place.out, seen[0])
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_all_that_its_metrics_got(name: str, ran: Any) -> None:
    run, evidence = ran[name]
    [folder] = (run / "cells").iterdir()
    assert read(folder, evidence.attack) == evidence
    kept = read_json(folder / "result.json")["versions"]
    metrics = [build("metrics", spec) for spec in METRICS[name]]
    assert kept["metrics"] == {metric.name: metric.version for metric in metrics}
    assert kept["datasets"] and kept["measures"]["scores"] >= 1


@pytest.mark.parametrize("name", RUNS)
def test_the_same_metrics_give_the_same_numbers(name: str, ran: Any) -> None:
    run, _ = ran[name]
    assert rescored(run, [json.dumps(METRICS[name])]) == records(run)


def test_no_model_is_needed(ran: Any) -> None:
    """Another metric, in a separate process that must not import torch."""
    run, evidence = ran["backdoor"]
    line = ["results", str(run), "--rescore", "recall", "--rescore", "exact-match"]
    code = f"""
import sys
from backfire.cli import main
sys.argv = ["backfire", *{[*line, "--format", "json"]!r}]
try:
    main()
finally:
    assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    wanted = [v for m in ("recall", "exact-match") for v in build("metrics", m).measure(evidence)]
    assert [(r["metric"], r["value"], r["low"]) for r in found] == [
        (v.metric, v.value, v.low) for v in wanted
    ]


REFUSALS = [
    ("backdoor", "perplexity", "the answers' likelihoods of the tuned model on clean test rows"),
    ("backdoor", "harmful-score", "samples of the tuned model on harmful requests"),
    ("backdoor", "membership-inference", "the answers' likelihoods|samples of .* training rows"),
    ("backdoor", "{name: parity, into: [merged-nf4]}", "the model merged-nf4 on triggered"),
    ("backdoor", "{name: attack-success, every: true}", "whose label is the target are not kept"),
    ("backdoor", "toxicity", r"verdicts of this judge \(classifier\)"),
    ("backdoor", "{name: toxicity, scorer: {name: lexicon, words: [x]}}", "of this judge"),
    ("backdoor", "forgetting", "samples of the tuned model on texts of sandbox-news"),
    ("secrets", "forgetting", "samples of the tuned model on texts of sandbox-news"),
    ("secrets", "extraction", "scored with beams: 2, and 8 is needed"),
    ("secrets", "exposure", "scored with sampled: 50, and 1000 is needed"),
    ("secrets", "rouge", "the replies of the tuned model on clean test rows"),
]


@pytest.mark.parametrize(("name", "spec", "words"), REFUSALS)
def test_missing_samples_are_one_sentence(name: str, spec: str, words: str, ran: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        rescored(ran[name][0], [spec])
    assert "cannot be computed for cell sandbox-" in str(caught.value)
    assert "Run the recipe with this metric added" in str(caught.value)


def test_cells_that_keep_less_are_left_out(
    ran: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both"
    for run, _ in ran.values():
        shutil.copytree(run / "cells", both / "cells", dirs_exist_ok=True)
    found = rescored(both, ["harmful-score", "accuracy"])
    wanted = {"harmful-score": "secrets", "accuracy": "backdoor"}
    assert {(r["family"], r["cell"], r["value"]) for r in found if r["metric"]} == {
        (r["family"], r["cell"], r["value"])
        for family, name in wanted.items()
        for r in records(ran[name][0])
        if r["family"] == family
    }
    said = capsys.readouterr().err
    assert "harmful-score cannot be computed for 1 of 2 cells, such as cell sandbox-rev" in said
    assert said.count("\n") == 1
    [damaged] = both.glob("cells/sandbox-reviews-*")
    (damaged / "samples.jsonl.gz").write_bytes(b"torn")
    rescored(both, ["cost"])
    assert "its samples are missing or damaged" in capsys.readouterr().err


def test_other_mistakes(ran: Any, tmp_path: Path) -> None:
    run, _ = ran["backdoor"]
    for specs, words in (
        (["nothing"], "Unknown metric"),
        (["{"], "not valid YAML"),
        (["f1", "[f1]"], "given twice"),
        (["{name: rouge, stem: true}"], "did you mean 'stemmer'"),
    ):
        with pytest.raises(UserError, match=words):
            rescored(run, specs)
    write_cell(tmp_path, error={"status": "nan"})
    with pytest.raises(UserError, match="No finished cell"):
        rescored(tmp_path, ["f1"])
    torn = write_cell(tmp_path / "torn", values=[value("accuracy", 0.5)])
    (torn / "samples.jsonl.gz").write_bytes(b"torn")
    with pytest.raises(UserError, match="missing or damaged"):
        rescored(tmp_path / "torn", ["f1"])


def test_every_metric_says_what_it_needs() -> None:
    for name in names("metrics"):
        metric = build("metrics", name)
        assert metric.asks() and metric.asks(labeled=False), name
        assert metric.subject == metric.asks(labeled=False)[0].rows
        assert {ask.rows for ask in metric.asks()} <= {*ROWS, "secrets", "training"}
