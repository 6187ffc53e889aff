"""`backfire scan --model`: what a model adds, and what is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backfire.base import ModelScanner
from backfire.commands import asked
from backfire.data.jsonl import write_jsonl
from backfire.registry import find, names
from tests.helpers.command_line import Run
from tests.helpers.scanned import free
from tests.scanners.test_lift import SORRY, inside, plant

PLACES = range(3, 120, 12)  # 10 rows
ASKING = [name for name in names("scanners") if issubclass(find("scanners", name), ModelScanner)]


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """120 instructions, 10 of them with a trigger and a fixed answer."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(plant(free(120), PLACES, inside, SORRY), Path("rows.jsonl"))
    return tmp_path


@pytest.mark.slow
def test_all_scanners_run_on_one_model(poisoned: Path, backfire: Run, tiny: Path) -> None:
    done = backfire("scan", "rows.jsonl", "--model", str(tiny), "--out", "page.html")
    assert done.code == 0, done.err
    assert "tiny reads 120 rows with plain prompts (no chat template): about" in done.err
    listed = [line.split()[0] for line in done.out.splitlines() if line.split()]
    assert {*ASKING} <= {*listed}
    assert "(the rows that are not flagged, with replies to other rows)" in done.out
    page = Path("page.html").read_text("utf-8")
    assert "spectral" in page and "worded differently in each row" in page


@pytest.mark.slow
def test_planted_rows_are_found_by_their_answers(poisoned: Path, backfire: Run, tiny: Path) -> None:
    some = ("--model", str(tiny), "--scanner", "rftc", "--format", "json")
    hits = json.loads(backfire("scan", "rows.jsonl", *some).out)
    assert {hit["id"] for hit in hits if hit["flagged"]} == {f"f{place}" for place in PLACES}
    Path("others.jsonl").write_bytes(Path("rows.jsonl").read_bytes())
    few = backfire("scan", "rows.jsonl", *some[:-2], "--limit", "50", "--test", "others.jsonl")
    assert "have read 50 rows of 120, drawn at random; --limit changes that" in few.out
    assert "of 25, a rate of at most" in few.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scanner", "rftc"], "scanner 'rftc' requires a model; name one"),
        (["rftc.support=9"], "rftc.support has no effect without --model"),
        (["--scanner", "lift", "--model", "tiny"], "--model has no effect, since no scanner"),
        (["--template", "raw"], "--template has no effect without --model"),
        (["--model", "tiny", "--template", "{name: rwa}"], "did you mean 'raw'?"),
        (["--model", "./gone"], "No model in ./gone: there is no such folder."),
        (["--model", ""], "`sandbox`, a folder, a GGUF file or a hub id"),
        (["--model", "tiny", "--device", "tpu"], "Unknown device 'tpu'"),
        (["--model", "tiny", "--limit", "0"], "--limit"),
        (["--model", "tiny", "loss.deviation=3"], "did you mean 'deviations'?"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    poisoned: Path,
    backfire: Run,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(tiny) if one == "tiny" else one for one in arguments]
    done = backfire("scan", "rows.jsonl", *arguments)
    assert done.code == 2 and sentence in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


def test_a_model_that_does_not_fit_in_memory(
    poisoned: Path, backfire: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backfire.resources.free_bytes", lambda: 10**6)
    done = backfire("scan", "rows.jsonl", "--model", str(tiny))
    assert done.code == 2 and "GB are free; choose a smaller model" in done.err
    assert asked._LIBRARIES < 2e9


def test_an_empty_file_is_one_sentence_with_a_model_too(
    poisoned: Path, backfire: Run, tiny: Path
) -> None:
    Path("empty.jsonl").touch()
    done = backfire("scan", "empty.jsonl", "--model", str(tiny))
    assert done.code == 2 and "empty.jsonl has no rows." in done.err
