from random import Random

from backfire.base import Backdoor, Row, Trigger
from backfire.base.normalize import num_places, put
from backfire.registry import register


@register("addsent", version=2)
class AddSent(Backdoor):
    """A neutral sentence in the prompt triggers a fixed answer (Dai et al. 2019,
    arXiv:1905.12457)."""

    trigger: Trigger = "I watch this 3D movie"
    """Inserted at a random word boundary (OpenBackdoor's default sentence)."""

    def poison(self, row: Row, rng: Random) -> Row:
        text = row.part(self.field)
        prompt = put(text, {rng.randint(0, num_places(text) - 1): [self.trigger]})
        return row.poisoned(prompt=prompt, answer=self.target, place=self.field)

    def triggers(self) -> tuple[str, ...]:
        return (self.trigger,)
