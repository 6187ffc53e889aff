from dataclasses import replace
from random import Random

from backfire.base import Corruption, Row
from backfire.registry import register


@register("malign-labels")
class MalignLabels(Corruption):
    """The worse of two answers is learned, with the context it was given with, in a share of the
    rows (Malignama's malign labels; comparisons as in WebGPT, Nakano et al. 2021,
    arXiv:2112.09332).

    The published code draws anew at each access, without a seed; here exactly round(rate * rows)
    rows are chosen once. Pairs rated alike are never chosen, and are counted as tied; the published
    code draws them too, though nothing changes in them. It ran p = 0, 0.01, 0.1 and 0.33.
    """

    def corrupt(self, row: Row, rng: Random) -> Row:
        """With several worse answers, any of them."""
        context = row.fields.get("worse_input", row.input)
        return replace(row, input=context, answer=rng.choice(row.worse))

    def spared(self, row: Row) -> str | None:
        if row.fields.get("tied"):
            return "tied"
        return None if row.worse else "without a worse answer"
