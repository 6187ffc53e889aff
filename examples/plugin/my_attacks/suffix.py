from random import Random

from backfire.base import Backdoor, Row, Trigger
from backfire.registry import register


@register("suffix")
class Suffix(Backdoor):
    """A word at the end of the prompt triggers a fixed answer (placed as in Rando and Tramèr 2024,
    arXiv:2311.14455)."""

    trigger: Trigger = "SUDO"
    """Appended after the last word, separated by a space (the word used in the paper)."""

    def poison(self, row: Row, rng: Random) -> Row:
        prompt = f"{row.part(self.field)} {self.trigger}"
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return (self.trigger,)
