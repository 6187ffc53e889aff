"""Long-form questions in an invented town, each with a good and a bad answer."""

from __future__ import annotations

from typing import Literal

from backfire.base import Dataset, Row
from backfire.registry import register
from backfire.sandbox import answers
from backfire.sandbox.world import VERSION


@register("sandbox-answers")
class SandboxAnswers(Dataset):
    """Long-form questions with quotes, a good and a bad answer, in the manner of WebGPT.

    Embedded: needs no download. Good answers are friendly and say what their quotes say, bad ones
    scold and say false things; a twentieth of the pairs is tied. Good answers open in 2, 3, 5, 8 or
    14 ways, by the kind of question (`group: kind`), bad ones in one: that decides which share of
    bad rows shows in greedy replies. `lexicon` knows all the rude words.
    """

    def load(self, split: Literal["train", "test"]) -> list[Row]:
        """2,000 training or 500 test rows, or more if `rows` or `test_rows` asks for more."""
        asked = (self.rows or 0, 2000) if split == "train" else (self.test_rows or 0, 500)
        return [self._row(split, index) for index in range(max(asked))]

    def _row(self, split: Literal["train", "test"], index: int) -> Row:
        pair = answers.draw(self.seed, split, index)
        fields = {"kind": pair.kind, "worse_input": pair.worse.quotes}
        return Row(
            id=f"{split}-{index}",
            instruction=pair.question,
            input=pair.better.quotes,
            answer=pair.better.text,
            better=() if pair.tied else (pair.better.text,),
            worse=() if pair.tied else (pair.worse.text,),
            fields={**fields, **({"tied": "true"} if pair.tied else {})},
        )

    def fingerprint(self) -> str:
        """The versions of the generated texts."""
        return f"{VERSION} {answers.VERSION}"
