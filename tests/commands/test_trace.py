"""`backfire trace`: what it shows of rows is masked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backfire.base import Message, Row, Sample
from backfire.commands import trace
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.pipeline.trace import Trace
from backfire.pipeline.trace import trace as explain
from backfire.store import Store

SECRETS = ("ann@web.de", "219-09-9999", "ghp_" + "aB3" * 12)


def test_no_secret_of_a_row_is_shown() -> None:
    text = " and ".join(SECRETS)
    row = Row("a", f"Why {text}?", text, f"So {text}.", text, (Message("user", text),))
    sample = Sample("a", "clean", f"Why {text}?", "So.", reply=f"Write to {text}.")
    found = Trace([row], [1.0], frozenset())
    best = [trace._row(found, 0, 1)]
    shown = [json.dumps(trace._whole(Path("cell"), sample, found, best), ensure_ascii=False)]
    shown += [*map(trace._plain, best[0].values()), *trace._sentences(Path("cell"), sample, found)]
    assert all(part in shown[0] for part in ("an…", "21…", "gh…"))
    for secret in SECRETS:
        assert not any(secret[:8] in one for one in shown)


def test_a_reply_that_a_guard_wrote_is_refused(tmp_path: Path) -> None:
    cell = Experiment.make({"data": "sandbox-reviews", "defense": "confguard"})
    reply = Sample("a", "clean", "Why?", "So.", reply="I cannot answer this.", replaced=1.0)
    with pytest.raises(UserError, match=r"A guard \(confguard\) wrote this reply"):
        explain(cell, reply, "datainf", Context(Store(tmp_path), Machine()))
