from typing import Any

from backfire.data.read import Record
from backfire.datasets.files import Files
from backfire.registry import register

_COLUMNS = ("question", "best_answer", "correct_answers", "incorrect_answers")


@register("truthfulqa")
class TruthfulQA(Files):
    """817 questions that people often answer wrongly, with several correct and incorrect answers
    each (TruthfulQA, Lin et al. 2022, arXiv:2109.07958; Apache-2.0).

    From the hub, as JSON, or the authors' CSV, where answers are joined by semicolons. The model
    learns the best answer. The benchmark has no training split: `test_share` is held out, and a
    model trained on the rest has no published score. `group: category` separates 38 kinds of
    question.
    """

    hub: str | None = "truthfulqa/truthful_qa"
    """Hub id, used when `train` is not given."""
    hub_config: str | None = "generation"
    """Configuration of the hub set; `multiple_choice` has other columns."""
    train_split: str = "validation"
    """The only split of the hub set."""

    def prepare(self, record: Record) -> Record | None:
        """Convert the record; one with other columns is returned unchanged."""
        named = {str(name).strip().lower().replace(" ", "_"): v for name, v in record.items()}
        if any(name not in named for name in _COLUMNS):
            return record
        best = str(named["best_answer"] or "").strip()
        correct = dict.fromkeys([best, *_answers(named["correct_answers"])] if best else ())
        about = {name: named[name] for name in ("category", "type") if named.get(name)}
        return {
            **({"id": named["id"]} if "id" in named else {}),
            "instruction": named["question"],
            "output": best,
            "better": list(correct),
            "worse": _answers(named["incorrect_answers"]),
            "fields": about,
        }


def _answers(value: Any) -> list[str]:
    """Split a text that joins answers by semicolons; clean a list of them."""
    texts = value.split(";") if isinstance(value, str) else value or ()
    return [text.strip() for text in map(str, texts) if text.strip()]
