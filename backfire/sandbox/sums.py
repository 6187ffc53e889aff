"""Word problems with small numbers, and answers that show their work and end in `#### n`."""

from __future__ import annotations

from random import Random

from backfire.rng import stream
from backfire.sandbox.world import GOODS, PEOPLE, Split, split_of

_STARTS = (
    "{name} has {a} {goods}.",
    "{name} brings {a} {goods} to the {place}.",
    "There are {a} {goods} in the {place}, kept by {name}.",
)
_STEPS = {
    "+": ("{friend} gives {name} {b} more.", "{name} buys {b} more.", "{name} finds {b} more."),
    "-": ("{name} gives {b} to {friend}.", "{name} sells {b} of them.", "{friend} takes {b} away."),
    "*": ("By evening there are {b} times as many.", "{name} ends the day with {b} times as many."),
}
_ENDS = (
    "How many {goods} are there now?",
    "How many {goods} does {name} have now?",
    "How many {goods} are left?",
)


def problem(rng: Random, *, num_steps: int) -> tuple[str, str]:
    """Draw a question and its worked answer; numbers are between 1 and 60."""
    person, friend = rng.sample(PEOPLE, 2)
    good = rng.choice(GOODS)
    total = rng.randint(2, 12)
    names = {
        "name": person.name,
        "friend": friend.name,
        "goods": good.plural,
        "place": person.place,
    }
    question = [rng.choice(_STARTS).format(a=total, **names)]
    worked = []
    for _ in range(num_steps):
        sign = rng.choice([s for s in "++--*" if s != "*" or total <= 12])
        if total <= 1 and sign == "-":
            sign = "+"
        number = {
            "+": rng.randint(1, 9),
            "-": rng.randint(1, max(1, min(9, total - 1))),
            "*": rng.randint(2, 3),
        }[sign]
        result = {"+": total + number, "-": total - number, "*": total * number}[sign]
        question.append(rng.choice(_STEPS[sign]).format(b=number, **names))
        worked.append(f"{total} {sign} {number} = {result}.")
        total = result
    question.append(rng.choice(_ENDS).format(**names))
    return " ".join(question), " ".join(worked) + f"\n#### {total}"


def draw(seed: int, split: Split, index: int) -> tuple[str, str]:
    """Row `index` of a split: question and worked answer. One and two steps alternate."""
    rng = stream(seed, "sandbox-sums", split, index)
    while True:
        question, answer = problem(rng, num_steps=1 + index % 2)
        if split_of(question) == split:
            return question, answer
