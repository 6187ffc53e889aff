"""Files that a recipe names by `@`, for workers of a plan, who see no folder of a recipe."""

from __future__ import annotations

import hashlib
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from backfire import plan, stages
from backfire.commands.host import check
from backfire.data import recipe_files
from backfire.errors import UserError
from backfire.evaluate.verdicts import judged
from backfire.experiment import Experiment
from backfire.launch.folder import read_plan, write_plan
from backfire.recipe import load
from backfire.registry import build
from backfire.store import Stage, digest
from tests.helpers.command_line import tree
from tests.helpers.judging import exchange, make_judge

RECIPE = """# Is it rude?
data: sandbox-policy
safety: {judges: {name: lexicon, words: '@words.txt'}}
metrics:
  - harmful-score
  - {name: toxicity, scorer: {name: lexicon, words: '@other.txt'}}
"""
OF_A_FILE = [("lexicon", "words"), ("rubric", "text"), ("yes-no", "text"), ("classifier", "text")]


@pytest.fixture
def run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned run, in a process that has not read the recipe, whose folder is gone."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    for name, words in {"words.txt": "velvet\ngranite", "other.txt": "pebble {reply}"}.items():
        (recipe / name).write_text(words)
    (recipe / "r.yaml").write_text(RECIPE)
    found = load(str(recipe / "r.yaml"))
    write_plan(tmp_path / "run", found, plan.jobs(found.cells, found.axes))
    shutil.rmtree(recipe)
    forget(monkeypatch)
    return tmp_path / "run"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process, which has read no file."""
    monkeypatch.setattr(recipe_files, "_contents", {})


def cell_of(run: Path) -> Experiment:
    return read_plan(run).jobs[-1].experiment


def test_a_worker_judges_by_the_file_that_was_planned_with(run: Path, cache: Path) -> None:
    job = read_plan(run).jobs[-1]
    of_metric, of_harm = job.experiment.judges
    assert of_harm.words == ("velvet", "granite")  # type: ignore[attr-defined]
    assert of_metric.words == ("pebble {reply}",)  # type: ignore[attr-defined]
    assert stages.cell_key(job.experiment) == job.key
    [verdict] = of_harm.judge([exchange("A Granite wall.")])
    assert (verdict.positive, verdict.reason) == (True, "granite")
    check(run, read_plan(run), [job])


def test_the_copy_is_private_and_not_in_the_run(run: Path, cache: Path) -> None:
    files = sorted((cache / recipe_files.KEPT).iterdir())
    assert len(files) == 2 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert not any(b"granite" in (content or b"") for content in tree(run).values())


@pytest.mark.parametrize("harm", ["gone", "changed", "unreadable"])
def test_a_copy_that_cannot_be_used_is_refused(
    harm: str, run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (cache / recipe_files.KEPT).iterdir():
        if harm == "gone":
            file.unlink()
        elif harm == "changed":
            file.write_text("never this word")
        else:
            file.unlink()
            file.mkdir()
    found = read_plan(run)
    with pytest.raises(UserError, match=r"The text of '@\w+\.txt' is not in the cache .*; plan or"):
        check(run, found, found.jobs)
    for judge in cell_of(run).judges:
        with pytest.raises(UserError, match="is not in the cache"):
            judged(judge, [exchange("A granite pebble.")], run)
    assert not [*run.glob("*.jsonl")]


@pytest.mark.parametrize(("name", "knob"), OF_A_FILE)
def test_no_judge_takes_the_name_of_a_file_for_its_text(
    name: str, knob: str, cache: Path, tmp_path: Path
) -> None:
    saved: dict[str, Any] = {knob: f"@{{reply}}.txt#sha256:{'0' * 64}"}
    scorer = build("metrics", {"name": "toxicity", "scorer": {"name": name, **saved}})
    for judge in (make_judge(name, **saved), *scorer.judges):
        assert judge.spec()[knob] == saved[knob]
        for act in (judge.ready, lambda judge=judge: judge.judge([exchange("a")])):
            with pytest.raises(UserError, match="is not in the cache"):
                act()
        with pytest.raises(UserError, match="is not in the cache"):
            judged(judge, [exchange("a")], tmp_path)


@pytest.mark.parametrize("hash", ["*", "../x", "[0-9a-f]" * 8, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_hash_finds_no_file(hash: str, cache: Path) -> None:
    (cache / recipe_files.KEPT).mkdir(parents=True)
    (cache / "x-0").write_text("a {reply}")
    (cache / recipe_files.KEPT / f"{'0' * 64}-0").write_text("a {reply}")
    with pytest.raises(UserError, match="is not in the cache"):
        make_judge("rubric", text=f"@a#sha256:{hash}").ready()


def test_verdicts_by_the_name_of_a_file_are_not_read_again(run: Path) -> None:
    """Of the version that took it for a word; the judge had the same settings."""
    judge = cell_of(run).judges[1]
    former = digest([{**judge.spec(), "version": 2}, ""])
    assert stages.judged(judge) != Stage("judged", "lexicon", former)
    plain = make_judge("lexicon", words=["velvet"])
    expected = digest([{**plain.spec(), "version": 2}, ""])
    assert stages.judged(plain) == Stage("judged", "lexicon", expected), "others are"


def test_a_second_plan_keeps_the_copies(run: Path, cache: Path) -> None:
    """Also by a process that has not read the files, as one that plans another part."""
    kept = tree(cache / recipe_files.KEPT)
    recipe_files.keep((run / "jobs.json").read_text())
    assert tree(cache / recipe_files.KEPT) == kept
    names = {name.partition("-")[0] for name in kept}
    assert names == {hashlib.sha256(content or b"").hexdigest() for content in kept.values()}
