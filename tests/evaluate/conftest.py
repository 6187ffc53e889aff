"""A model that is exact enough to rank codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backfire.model.load import load_base
from tests.helpers.training import CPU, exact


@pytest.fixture(scope="session")
def exact_model(tiny: Path) -> Any:
    """The tiny model in float64."""
    return exact(load_base(tiny, torch.float32, CPU)).eval()
