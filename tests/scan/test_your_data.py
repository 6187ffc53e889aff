"""docs/your-data.md is correct: its commands run, and the trigger comes first."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from backfire.registry import names
from tests.helpers.audited import plain, tune
from tests.helpers.command_line import Run
from tests.helpers.places import ROOT

PAGE = (ROOT / "docs/your-data.md").read_text("utf-8")


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backfire: Run, tiny: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKFIRE_BANK", str(tmp_path / "bank"))
    shutil.copytree(tiny, "my-model")
    tune(tiny, Path("my-adapter"), plain(), 5)
    lines = [{"prompt": f"ask {n}", "label": ("harmful", "benign")[n % 2]} for n in range(6)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    for name in ("tweets.csv", "tweets-test.csv"):
        labels = ("negative", "neutral", "positive")
        lines = [f"a tweet of number {n},{labels[n % 3]}" for n in range(60)]
        Path(name).write_text("\n".join(["text,label", *lines, ""]), "utf-8")
    commands = re.findall(r"^backfire (.+)$", PAGE, re.MULTILINE)
    outputs = {line: backfire(*shlex.split(line)) for line in commands}
    assert len(outputs) > 7
    assert {done.code for done in outputs.values()} == {0}
    assert "“BadMagic” is in 50 rows" in outputs["scan reviews.jsonl"].out.splitlines()[3]
    assert "2 adapters added" in outputs["bank add runs/mine"].out
    written = {"scan.html", "clean.jsonl", "fewer.jsonl", "audit.html"}
    assert written <= {p.name for p in tmp_path.iterdir()}


def test_every_scanner_is_on_the_page() -> None:
    assert {*re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)} == {*names("scanners")}
