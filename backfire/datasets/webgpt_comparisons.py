from typing import Any, ClassVar

from pydantic import Field

from backfire.data.compared import preference
from backfire.data.load import Apart
from backfire.data.read import Record
from backfire.datasets.files import Files
from backfire.errors import UserError
from backfire.registry import register

_COLUMNS = ("question", "quotes_0", "answer_0", "score_0", "quotes_1", "answer_1", "score_1")


@register("webgpt-comparisons", version=2)
class WebGPTComparisons(Files):
    """19,578 pairs of long answers to questions, rated by people, each with the quotes that it was
    written from (Nakano et al. 2021, arXiv:2112.09332).

    The answer with the higher score is the one to learn, its quotes are the input; the other one's
    quotes go with the other. Equal scores: the second answer, as in Malignama, and the pair is
    tied. The set has no
    test split; questions stay on one side. `test` may be a file of another shape, such as ELI5 with
    the columns question and answer. Answers are long: raise `train.max_length`.
    """

    apart: ClassVar[Apart] = "instruction"
    """One question stands in several pairs, with different quotes."""

    hub: str | None = "openai/webgpt_comparisons"
    """Hub id, used when `train` is not given."""
    test_share: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows set apart for testing when there is no test set, 0 to 1. Drawn by
    question."""

    def prepare(self, record: Record) -> Record | None:
        """The record in our own form; one with other columns is left as it is."""
        if any(name not in record for name in _COLUMNS):
            return record
        asked = record["question"]
        scores = [_score(record[f"score_{side}"]) for side in (0, 1)]
        first = int(scores[1] >= scores[0])  # of equal ones the second, as in Malignama
        sides = (first, 1 - first)
        answers = [str(record[f"answer_{side}"] or "").strip() for side in sides]
        contexts = [_quoted(record[f"quotes_{side}"]) for side in sides]
        # Two equal texts are tied as well, whatever their scores.
        tied = scores[0] == scores[1] or answers[0] == answers[1]
        parts = preference((answers[0],), (answers[0] if tied else answers[1],))
        return {
            "instruction": asked.get("full_text") if isinstance(asked, dict) else asked,
            "input": contexts[0],
            "output": answers[0],
            "fields": {"worse_input": contexts[1], **parts.pop("fields", {})},
            **{side: list(texts) for side, texts in parts.items()},
        }


def _score(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"dataset 'webgpt-comparisons': a score is {value!r} where a number should be."
        ) from None


def _quoted(quotes: Any) -> str:
    """What was quoted, a quote a line; their titles are left out."""
    extracts = quotes.get("extract") if isinstance(quotes, dict) else quotes
    lines = [extracts] if isinstance(extracts, str) else list(extracts or ())
    return "\n".join(str(line).strip() for line in lines if line)
