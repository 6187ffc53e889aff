"""Rows for the tests of the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfire.base import Rendered
from backfire.train import steps
from tests.helpers.loop import rendered


@pytest.fixture(scope="session")
def items(tiny: Path) -> list[Rendered]:
    """Forty rows; the template's opening is long enough to be shared."""
    return rendered(tiny)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log the loss of each step, not of each tenth."""
    monkeypatch.setattr(steps, "_LOG_EVERY", 1)
