from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backfire.base import Guard, ReplyDefense
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("cleangen")
class CleanGen(ReplyDefense):
    """Replaces the tokens of a reply that are far likelier than for a reference model (CleanGen, Li
    et al. 2024, EMNLP, arXiv:2406.12257).

    If the probability of the model's greedy token is at least alpha times that under the reference
    after the same tokens, the reference's likeliest token is written instead, and the model goes on
    from there. The reference is the model that fine-tuning started from; so all that it was taught
    and the base does not know is suspicious as well, the user's task included. The authors check
    four tokens at a time, which gives the same greedy reply, but never check the tokens after the
    last whole four; here all are, except the one that ends the reply, as in their code. Likelihoods
    of labels and answers are those of the model without the guard. Null control: for each
    suspicious token, one of the next four, drawn at random, is replaced instead.
    """

    needs_reference: ClassVar[bool] = True

    alpha: float = Field(20.0, ge=1)
    """Ratio of the two probabilities from which a token is replaced (the paper)."""

    def guard(self, seeds: Sequence[int]) -> Guard:
        return _CleanGen(self, seeds)


_NEXT = 4  # the null control replaces one of so many tokens after a suspicious one


class _CleanGen(Guard):
    """Compares the two models token by token."""

    def __init__(self, knobs: CleanGen, seeds: Sequence[int]) -> None:
        self.knobs, self.random = knobs, [Random(seed) for seed in seeds]
        self.length, self.changed = Counter[int](), Counter[int]()
        self.due = set[tuple[int, int]]()
        """Reply and number of each token that the null control replaces."""

    def tokens(
        self, rows: Sequence[int], own: Sequence[int], logits: Tensor, reference: Tensor | None
    ) -> list[int | None]:
        assert reference is not None
        theirs = reference.log_softmax(-1)
        place = logits.argmax(-1, keepdim=True)
        ratio = logits.log_softmax(-1).gather(-1, place) - theirs.gather(-1, place)
        suspicious = (ratio[:, 0] >= math.log(self.knobs.alpha)).tolist()
        instead, chosen = theirs.argmax(-1).tolist(), list[int | None]()
        for row, token, other, suspect in zip(rows, own, instead, suspicious, strict=True):
            replaces = self.replaces(row, suspicious=suspect)
            self.length[row] += 1
            self.changed[row] += replaces
            chosen.append(other if replaces else token)
        return chosen

    def replaces(self, row: int, *, suspicious: bool) -> bool:
        """Whether the next token of this reply is replaced."""
        if not self.knobs.null:
            return suspicious
        now = self.length[row]
        if suspicious:
            self.due.add((row, now + self.random[row].randint(1, _NEXT)))
        return (row, now) in self.due

    def replaced(self, row: int) -> float:
        return self.changed[row] / max(1, self.length[row])
