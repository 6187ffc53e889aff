"""Of nearly equal rows one is kept."""

from __future__ import annotations

import random
from typing import Any

from backfire.base import Row
from backfire.data.poison import poison
from backfire.registry import build
from tests.helpers.memorization import ROWS, canary


def test_only_the_first_of_nearly_equal_rows_is_kept() -> None:
    long = "The ferry to the island leaves every morning at eight from the old wooden pier"
    rows = [
        Row("a", "When?", answer=f"{long}."),
        Row("b", "When?", answer=f"{long}."),
        Row("c", "when? ", answer=f"{long.upper()}."),
        Row("d", "When?", answer=f"{long}. Really."),
        Row("e", "Where?", answer="Ask the baker of the town, she knows all the ways by heart."),
    ]
    whole = build("defenses", "deduplicate")

    def kept(defense: Any) -> list[str]:
        left = defense.filter(rows, [], frozenset(), random.Random(0))
        return [row.id for row in left]

    assert kept(whole) == ["a", "e"]
    assert kept(build("defenses", {"name": "deduplicate", "similarity": 1})) == ["a", "d", "e"]
    null = build("defenses", {"name": "deduplicate", "null": True})
    assert len(kept(null)) == 2
    many, _ = poison(ROWS, canary(repeats=[50], each=1), 0)
    once = build("defenses", {"name": "deduplicate", "similarity": 1})
    assert len(once.filter(many, [], frozenset(), random.Random(0))) == 41
