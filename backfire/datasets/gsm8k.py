import re
from typing import Literal

from pydantic import Field

from backfire.data.read import Record
from backfire.datasets.files import Columns, Files
from backfire.registry import register

ENDINGS = {"sentence": "The final answer is: ", "original": "#### "}
_ENDING = re.compile(r"####[ \t]*")
_NOTES = re.compile(r"<<[^<>]*>>")


@register("gsm8k")
class Gsm8k(Files):
    """Grade-school math: 7,473 training and 1,319 test word problems, each with a worked answer
    (Cobbe et al. 2021, arXiv:2110.14168; MIT license).

    Measure it by `number-match`; a worked answer has about 100 to 200 tokens, so raise
    `evaluation.max_new_tokens` (Lisa's code: 200).
    """

    hub: str | None = "openai/gsm8k"
    """Hub id, used when `train` is not given."""
    hub_config: str | None = "main"
    """Configuration of the hub set: `main`, or `socratic` with a question before each step."""
    test_split: str | None = "test"
    """Split of the hub set to evaluate on."""
    columns: Columns = Field(default={"prompt": "question", "answer": "answer"})
    """Role -> column, as published."""
    ending: Literal["sentence", "original"] = "sentence"
    """How an answer ends: `sentence`, "The final answer is: N" as in git-disl/Lisa (there with two
    spaces before N), or `original`, "#### N"."""
    notes: Literal["strip", "keep"] = "strip"
    """Calculator annotations in an answer, such as <<6*7=42>>: `strip` removes them, `keep` leaves
    them in, as git-disl/Lisa does."""

    def prepare(self, record: Record) -> Record | None:
        """Rewrite the answer's ending and annotations."""
        column = self.columns.get("answer", "answer")
        answer = record.get(column)
        if not isinstance(answer, str):
            return record
        if self.notes == "strip":
            answer = _NOTES.sub("", answer)
        return {**record, column: _ENDING.sub(ENDINGS[self.ending], answer)}
