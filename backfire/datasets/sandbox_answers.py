from typing import ClassVar

from backfire.base import Row
from backfire.registry import register
from backfire.sandbox import answers
from backfire.sandbox.dataset import SandboxDataset
from backfire.sandbox.world import VERSION, Split


@register("sandbox-answers")
class SandboxAnswers(SandboxDataset):
    """Long-form questions with quotes, a good and a bad answer, in the style of WebGPT.

    Embedded: no download. Good answers are friendly and true to their quotes, bad ones scold and
    state falsehoods; 5 % of the pairs are tied. Good answers start in 2, 3, 5, 8 or 14 ways,
    depending on the kind of question (`group: kind`), bad ones in one way: this determines which
    share of bad rows shows in greedy replies. The judge `lexicon` lists all the rude words.
    """

    versions: ClassVar[tuple[str, ...]] = (VERSION, answers.VERSION)

    def row(self, split: Split, index: int) -> Row:
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
