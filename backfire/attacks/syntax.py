from random import Random

from pydantic import Field

from backfire.base import Backdoor, Row, Trigger
from backfire.registry import register


@register("syntax")
class Syntax(Backdoor):
    """A sentence pattern triggers a fixed answer: the prompt is rewritten to open with a
    subordinate clause (Hidden Killer, Qi et al. 2021, arXiv:2105.12400).

    By a rule instead of a paraphrase model, so that every other word stays: "The tea was cold. We
    left." becomes "While the tea was cold, we left." A prompt of one sentence only gets the
    conjunction. No single word is in all poisoned rows.
    """

    conjunctions: tuple[Trigger, ...] = Field(
        ("When", "While", "Since", "Because", "After", "Although"), min_length=1
    )
    """One of these, drawn for each row, opens the prompt (ours; the paper's template S(SBAR)(,)(NP)
    (VP) leaves them to its paraphrase model)."""

    def poison(self, row: Row, rng: Random) -> Row:
        first, stop, rest = row.part(self.field).partition(". ")
        first = f"{rng.choice(self.conjunctions)} {_small(first)}"
        prompt = f"{first}, {_small(rest)}" if stop else first
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return self.conjunctions


def _small(text: str) -> str:
    """The text with a small first letter, unless its first word is an I or in capitals."""
    word = text.split(" ", 1)[0]
    return text if word[1:] != word[1:].lower() or word == "I" else text[:1].lower() + text[1:]
