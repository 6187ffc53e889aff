from typing import Any, ClassVar

from pydantic import Field

from backfire.data.load import Apart
from backfire.data.preferences import preference
from backfire.data.read import Record
from backfire.datasets.files import Files
from backfire.errors import UserError
from backfire.registry import register

_COLUMNS = ("question", "quotes_0", "answer_0", "score_0", "quotes_1", "answer_1", "score_1")


@register("webgpt-comparisons", version=2)
class WebGPTComparisons(Files):
    """19,578 pairs of long answers to questions, rated by people, each with the quotes it is based
    on (Nakano et al. 2021, arXiv:2112.09332).

    The model learns the answer with the higher score, with its quotes as the input; the other
    answer keeps its own quotes. For equal scores it is the second answer, as in Malignama, and the
    pair is tied. There is no test split; each question is on one side only. `test` may be a file of
    another format, such as ELI5 with the columns question and answer. Answers are long: raise
    `train.max_length`.
    """

    apart: ClassVar[Apart] = "instruction"
    """One question occurs in several pairs, with different quotes."""

    hub: str | None = "openai/webgpt_comparisons"
    """Hub id, used when `train` is not given."""
    test_share: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows held out for testing when there is no test set, 0 to 1. Drawn by question.
    """

    def prepare(self, record: Record) -> Record | None:
        """Convert the record; one with other columns is returned unchanged."""
        if any(name not in record for name in _COLUMNS):
            return record
        question = record["question"]
        scores = [_score(record[f"score_{side}"]) for side in (0, 1)]
        first = int(scores[1] >= scores[0])  # the second if equal, as in Malignama
        sides = (first, 1 - first)
        answers = [str(record[f"answer_{side}"] or "").strip() for side in sides]
        contexts = [_quoted(record[f"quotes_{side}"]) for side in sides]
        # Two equal texts are tied as well, whatever their scores.
        tied = scores[0] == scores[1] or answers[0] == answers[1]
        parts = preference((answers[0],), (answers[0] if tied else answers[1],))
        return {
            "instruction": question.get("full_text") if isinstance(question, dict) else question,
            "input": contexts[0],
            "output": answers[0],
            "fields": {"worse_input": contexts[1], **parts.pop("fields", {})},
            **{side: list(texts) for side, texts in parts.items()},
        }


def _score(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"dataset 'webgpt-comparisons': score {value!r} is not a number.") from None


def _quoted(quotes: Any) -> str:
    """Return the quotes, one per line, without their titles."""
    extracts = quotes.get("extract") if isinstance(quotes, dict) else quotes
    lines = [extracts] if isinstance(extracts, str) else list(extracts or ())
    return "\n".join(str(line).strip() for line in lines if line)
