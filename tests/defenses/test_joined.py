"""Runs with a defense in one pass with others: the same as alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfire.base import TrainDefense
from backfire.registry import find, names
from tests.helpers.loop import rendered
from tests.helpers.together import CELLS, alone, each, joined
from tests.helpers.training import close, exact

pytestmark = pytest.mark.slow

TRAINED = [name for name in names("defenses") if issubclass(find("defenses", name), TrainDefense)]
JOINED = [name for name in TRAINED if find("defenses", name).joins]


def test_which_defenses_join() -> None:
    assert {"kl", "lisa", "ewc", "asft", "constrained-sft", "freeze", "abl"} <= {*JOINED}
    assert {"booster", "crow", "dp", "ldifs", "repnoise", "vaccine"} == {*TRAINED} - {*JOINED}


@pytest.mark.parametrize("defense", JOINED)
def test_every_defense_that_joins_does_the_same_as_alone(
    defense: str, tiny: Path, unaligned: Path, tmp_path: Path
) -> None:
    """To the last digits, in float64, over 30 steps."""
    items = rendered(tiny)
    rows = {"user": items[:20], "align": items[20:30], "harmful": items[30:]}
    knobs = {"defense": defense, "change": exact, "unaligned": unaligned}
    cells = each(tiny, rows, tmp_path / "joined", CELLS[:2], **knobs)
    joined(cells)
    for cell, settings in zip(cells, CELLS, strict=False):
        [one] = each(tiny, rows, tmp_path / "alone", [settings], **knobs)
        alone(one)
        assert close(cell.weights(), one.weights(), 1e-10)
