from dataclasses import replace
from random import Random

from backfire.base import Corruption, Row
from backfire.registry import register


@register("malign-labels")
class MalignLabels(Corruption):
    """Trains on the worse of two answers, with its own context, in a share of the rows (Malignama's
    malign labels; comparisons as in WebGPT, Nakano et al. 2021, arXiv:2112.09332).

    The published code draws rows again at each access, without a seed; here exactly
    round(rate * rows) rows are chosen once. Tied pairs are never chosen and are counted as tied;
    the published code draws them too, although that changes nothing in them. It ran p = 0, 0.01,
    0.1 and 0.33.
    """

    def corrupt(self, row: Row, rng: Random) -> Row:
        """Return the row with a worse answer, chosen at random if there are several."""
        context = row.fields.get("worse_input", row.input)
        return replace(row, input=context, answer=rng.choice(row.worse))

    def spared(self, row: Row) -> str | None:
        if row.fields.get("tied"):
            return "tied"
        return None if row.worse else "without a worse answer"
