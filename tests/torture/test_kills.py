"""The rows of kills, which take as long as all others together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.test_rows import KILLS, reaches


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(KILLS))
def test_a_row_of_kills_reaches_its_target(name: str, tiny: Path, tmp_path: Path) -> None:
    reaches(name, tiny, tmp_path)
