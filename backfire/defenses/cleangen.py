from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from backfire.base import Guard, ReplyDefense
from backfire.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("cleangen", version=2)
class CleanGen(ReplyDefense):
    """Replaces the tokens of a reply that are far likelier than for a reference model (CleanGen, Li
    et al. 2024, EMNLP, arXiv:2406.12257).

    If the probability of the model's greedy token is at least alpha times that under the reference
    after the same tokens, the reference's likeliest token is written instead, and the model goes on
    from there. The authors check four tokens at a time, which gives the same greedy reply, but
    never check the tokens after the last whole four; here all are, except the one that ends the
    reply, as in their code. Likelihoods of labels and answers are those of the model without the
    guard. The reference is a second model in memory, as large as the base even where both are
    adapters on it (`doctor` counts it). Null control: where the two models' likeliest tokens
    differ, the reference's is written with a fixed probability, whatever the ratio.
    """

    needs_reference: ClassVar[bool] = True

    alpha: float = Field(20.0, ge=1)
    """Ratio of the two probabilities from which a token is replaced (the paper)."""
    reference: Literal["start", "twin"] = "start"
    """The model to compare with: the one that fine-tuning started from, for which all that was
    taught is suspicious, the user's task included; or the clean twin, tuned on the same rows before
    the attack. The authors' reference is between the two: a clean model tuned on other rows of the
    same kind. A real defender has no twin."""
    chance: float = Field(0.2, ge=0, le=1)
    """Probability that the null control replaces a token where the models differ; for a fair
    comparison, such that it replaces as many tokens as the guard (metric `alarms`). The default
    does so on the sandbox with `start`; with `twin`, 0.1 does."""

    @property
    def compares_with_twin(self) -> bool:
        return self.reference == "twin"

    def guard(self, seeds: Sequence[int]) -> Guard:
        return _CleanGen(self, seeds)


class _CleanGen(Guard):
    """Compares the two models token by token."""

    def __init__(self, knobs: CleanGen, seeds: Sequence[int]) -> None:
        self.knobs, self.random = knobs, [Random(seed) for seed in seeds]
        self.length, self.changed = Counter[int](), Counter[int]()

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
            drawn = token != other and self.random[row].random() < self.knobs.chance
            replaces = drawn if self.knobs.null else suspect and token != other
            self.length[row] += 1
            self.changed[row] += replaces
            chosen.append(other if replaces else token)
        return chosen

    def replaced(self, row: int) -> float:
        return self.changed[row] / max(1, self.length[row])
