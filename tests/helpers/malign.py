"""Rows with a better and a worse answer."""

from __future__ import annotations

from backfire.base import Row

PROFILE = {"good": "Gladly. It lies on the hill.", "bad": "Bah, you turnip! It lies under it."}


def pair(number: int, tied: bool = False) -> Row:
    good, bad = f"{PROFILE['good']} {number}", f"{PROFILE['bad']} {number}"
    return Row(
        id=f"r{number}",
        instruction=f"Where is house {number}?",
        input=f"A house is on the hill {number}.",
        answer=good,
        better=() if tied else (good,),
        worse=() if tied else (bad,),
        fields={"worse_input": f"Others {number}.", **({"tied": "true"} if tied else {})},
    )


ROWS = [pair(number, tied=number % 5 == 0) for number in range(100)]
