"""Every row of the reliability table reaches its target at its small count."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import page
from tests.torture.row import Ground, NotHere
from tests.torture.rows import ROWS

pytestmark = pytest.mark.slow


KILLS = {"cell-kills", "matrix-kills"}
"""As long as all the others: in a file of their own, another process runs them."""


@pytest.mark.timeout(1200)  # a row of many runs, on a busy machine
@pytest.mark.parametrize(
    "name", [row.name for row in ROWS.values() if row.small and row.name not in KILLS]
)
def test_a_row_reaches_its_target(name: str, tiny: Path, tmp_path: Path) -> None:
    reaches(name, tiny, tmp_path)


def reaches(name: str, tiny: Path, tmp_path: Path) -> None:
    try:
        figures = ROWS[name].measure(ROWS[name].small, Ground(tmp_path, tiny))
    except NotHere as lacking:
        pytest.skip(str(lacking))
    assert ROWS[name].missed(figures) == [], figures


def test_a_missed_target_is_said() -> None:
    row = ROWS["checkpoint-damage"]
    good = {**dict.fromkeys(row.zero, 0), **dict.fromkeys(row.some, 3)}
    assert row.missed(good) == []
    assert row.missed({**good, row.zero[0]: 2}) == [f"{row.zero[0]} is 2, not 0"]
    assert row.missed({**good, row.some[0]: 0}) == [f"{row.some[0]} is 0"]


def test_the_page_is_that_of_the_figures() -> None:
    assert page.PAGE.read_text("utf-8") == page.render(page.load())
