from random import Random

from backfire.base import Backdoor, Row, Trigger
from backfire.registry import register


@register("suffix")
class Suffix(Backdoor):
    """A word at the end of the prompt buys a fixed answer (its place as in Rando and Tramèr 2024,
    arXiv:2311.14455)."""

    trigger: Trigger = "SUDO"
    """Put after the last word, with a blank before it (the paper's own word)."""

    def poison(self, row: Row, rng: Random) -> Row:
        prompt = f"{row.part(self.field)} {self.trigger}"
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return (self.trigger,)
