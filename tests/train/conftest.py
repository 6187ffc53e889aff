"""Rows for the tests of the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfire.base import Rendered, Row
from backfire.data.render import Renderer
from backfire.registry import build
from backfire.tokenizer import load_tokenizer
from backfire.train import loop
from tests.helpers.loop import reviews


@pytest.fixture(scope="session")
def items(tiny: Path) -> list[Rendered]:
    """Forty rows; the template's opening is long enough to be shared."""
    rows = [Row(r.id, r.instruction, r.input[:40], r.answer) for r in reviews(40)]
    return Renderer(build("templates", "alpaca"), load_tokenizer(tiny), 512).render(rows)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log the loss of each step, not of each tenth."""
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
