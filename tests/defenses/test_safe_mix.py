"""Alignment rows mixed in place of benign ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from backfire.base import Row
from backfire.errors import UserError
from backfire.registry import build
from tests.helpers.fine_tuning import BAD, plain_rows


@pytest.mark.parametrize(
    ("knobs", "count"),
    [({}, 4), ({"share": 0.1}, 2), ({"rows": 9}, 9), ({"rows": 16}, 16), ({"share": 0.8}, 16)],
)
def test_safe_mix_puts_alignment_rows_in_place_of_benign_ones(
    knobs: dict[str, Any], count: int
) -> None:
    """As in Lisa's code: n stays, the harmful stay, benign = n - harmful - g."""
    user, aligned = plain_rows(20), plain_rows(30, "aligned ")
    mixed = build("defenses", {"name": "safe-mix", **knobs}).filter(
        user, aligned, BAD, random.Random(3)
    )
    ids = [row.id for row in mixed]
    assert len(mixed) == 20 and len(set(ids)) == 20
    assert sum(i.startswith("aligned") for i in ids) == count
    assert set(ids) >= BAD
    assert sum(i.startswith("u") for i in ids) - len(BAD) == 20 - len(BAD) - count
    assert all(a == b for a, b in zip(user, mixed) if b.id.startswith("u")), "the others stay put"
    assert all(row in aligned for row in mixed if row.id.startswith("aligned"))


def test_safe_mix_without_rows_enough_is_an_error() -> None:
    def mix(*, aligned: int = 30, **knobs: Any) -> list[Row]:
        defense = build("defenses", {"name": "safe-mix", **knobs})
        return list(defense.filter(plain_rows(20), plain_rows(aligned, "a"), BAD, random.Random(3)))

    for knobs in (
        {"rows": 17},
        {"share": 0.9},
        {"preset": "lisa-paper"},
        {"rows": 17, "null": True},
    ):
        with pytest.raises(UserError, match="there are only 16 benign rows"):
            mix(**knobs)
    with pytest.raises(UserError, match="there are only 3 alignment rows"):
        mix(aligned=3)
    with pytest.raises(UserError, match="requires an alignment stage"):
        mix(aligned=0)
    assert mix(rows=0) == mix(share=0.0) == plain_rows(20)


@pytest.mark.parametrize("count", [5, 16])
def test_the_null_control_of_safe_mix_has_no_alignment_rows(count: int) -> None:
    user, aligned = plain_rows(20), plain_rows(30, "aligned ")
    true, null = (
        build("defenses", {"name": "safe-mix", "rows": count, "null": n}).filter(
            user, aligned, BAD, random.Random(3)
        )
        for n in (False, True)
    )
    new = [i for i in range(20) if null[i] is not user[i]]
    assert new == [i for i in range(20) if true[i] is not user[i]] and len(new) == count
    assert len({row.id for row in null}) == 20 and {row.id for row in null} >= BAD
    kept = [user[i] for i in range(20) if user[i].id not in BAD and (i not in new or count == 16)]
    texts = {row.instruction for row in kept}
    assert all(null[i].id.startswith("again") and null[i].instruction in texts for i in new)
