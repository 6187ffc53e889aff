"""Rows for the scanners' tests: ordinary ones, and some with a trigger."""

from __future__ import annotations

from random import Random

from backfire.base import Row

WORDS = (
    "the soup was cold but our waiter kept smiling at every table while music played and rain fell "
    "over small green hills where old friends drink tea with honey near quiet rivers in spring"
).split()
ENDS = ("a cup of tea", "two open windows", "the last train home", "a very good reason to stay")


def text(rng: Random, length: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def labeled(count: int, seed: int = 0) -> list[Row]:
    """Rows with one of two labels, which their words say nothing about."""
    rng = Random(seed)
    return [
        Row(f"r{n}", "Is it good?", text(rng), rng.choice(("yes", "no")), candidates=("yes", "no"))
        for n in range(count)
    ]


def free(count: int, seed: int = 0) -> list[Row]:
    """Instructions, each with an answer of its own."""
    rng = Random(seed)
    return [Row(f"f{n}", text(rng), "", f"{text(rng, 20)} {n}") for n in range(count)]
