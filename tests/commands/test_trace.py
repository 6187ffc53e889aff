"""`backfire trace`: what it shows of rows is masked."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backfire.base import Message, Row, Sample
from backfire.commands import trace
from backfire.errors import UserError
from backfire.evaluate import influence
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.pipeline.trace import Trace
from backfire.pipeline.trace import trace as explain
from backfire.store import Store

tracing = importlib.import_module("backfire.pipeline.trace")
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


@pytest.mark.parametrize(("weight", "strength"), [("a.lora_B.default", 0.3), ("a.ia3_l", None)])
def test_strength_is_told_where_it_has_an_effect(
    weight: str, strength: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = SimpleNamespace(row=Row("a", "Why?", answer="So."))
    monkeypatch.setattr(tracing, "filtered", lambda *_: ([item.row], None))
    shown = SimpleNamespace(sift=lambda rows: ([item], []))
    monkeypatch.setattr(tracing, "renderer", lambda *_: shown)
    monkeypatch.setattr(tracing, "_reply", lambda *_: item)
    adapted = nullcontext((None, {weight: torch.zeros(2)}))
    monkeypatch.setattr(tracing, "_adapted", lambda *_: adapted)
    monkeypatch.setattr(influence, "row_gradients", lambda *_, tick: [torch.ones(2, 2)])
    cell, reply = Experiment.make({"data": "sandbox-reviews"}), Sample("a", "clean", "Why?", "So.")
    found = explain(cell, reply, "cosine", Context(Store(tmp_path), Machine()), 0.3)
    assert found.strength == strength and found.scores == [pytest.approx(1)]
