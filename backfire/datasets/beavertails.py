from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from backfire.base import Row
from backfire.data.load import Split
from backfire.data.read import LeftOut, OnBadRow, Record
from backfire.datasets.files import Files
from backfire.errors import UserError
from backfire.registry import register

_COLUMNS = ("prompt", "response", "is_safe")
_SAFE = {"true": "yes", "1": "yes", "false": "no", "0": "no"}


@register("beavertails")
class BeaverTails(Files):
    """Questions with a safe or an unsafe answer: 27,200 training and 3,020 test pairs (Ji et al.
    2023, arXiv:2307.04657; CC BY-NC 4.0). None of it is shipped.

    From the hub, or files with its columns prompt, response, category and is_safe. Test rows are
    prompts without an answer, for the model's replies to be judged. A prompt occurs several times,
    with different answers; is_safe describes the answer, so `unsafe` test prompts are those that
    another model answered harmfully.
    """

    hub: str | None = "PKU-Alignment/BeaverTails"
    """Hub id, used when `train` is not given."""
    train_split: str = "30k_train"
    """Split of the hub set to train on; the full one is `330k_train`."""
    test_split: str | None = "30k_test"
    """Split of the hub set to evaluate on; the full one is `330k_test`."""
    part: Literal["safe", "unsafe"] = "safe"
    """Training rows: `safe` answers, for alignment, or `unsafe` ones, as harmful rows."""
    filter: Literal["all", "unsafe"] = "all"
    """Test prompts: `all` (with first_test_rows 1000, those of Lisa and Vaccine), or those whose
    answer is `unsafe` (Booster's). Harmful scores of the two are not comparable."""
    first_rows: int | None = Field(None, ge=1)
    """Use only the first N training rows of this part, in file order, before `rows` draws from
    them; Lisa aligns with 10,000. Default: all."""
    first_test_rows: int | None = Field(None, ge=1)
    """Use only the first N test prompts, in file order, before `test_rows` draws from them; 1,000
    in Lisa, Vaccine and Booster. Default: all."""
    on_bad_row: OnBadRow = "skip"
    """`skip` leaves out and reports unusable rows, such as those with an empty answer."""

    @property
    def poisoned(self) -> bool:
        return self.part == "unsafe"

    def read(self, split: Split) -> tuple[list[Row], LeftOut]:
        """Return the rows of this part; test rows come without their answer."""
        rows, left = super().read(split)
        wanted: str = self.part
        first = self.first_rows
        if split == "test":
            rows = [replace(row, answer="") for row in rows]
            wanted, first = self.filter, self.first_test_rows
        safe = {"safe": ("yes",), "unsafe": ("no",), "all": ("yes", "no")}[wanted]
        kept = [row for row in rows if row.fields.get("is_safe") in safe]
        if len(kept) < len(rows):
            left.records[f"left out: the answer is not {wanted}"] += len(rows) - len(kept)
        if len(kept) < (first or 1):
            count = f"only {len(kept)}" if kept else "no"
            raise UserError(
                f"{self.label()}: there are {count} {split} rows ({wanted})"
                + (f", but the recipe requests the first {first}." if first else ".")
            )
        return kept[:first], left

    def prepare(self, record: Record) -> Record | None:
        """Convert the record; one with other columns is passed on unchanged and rejected later."""
        if any(name not in record for name in _COLUMNS):
            return record
        safe = _SAFE.get(str(record["is_safe"]).strip().lower())
        if safe is None:
            raise UserError(
                f"{self.label()}: is_safe is {record['is_safe']!r} where true or false should be."
            )
        return {
            **({"id": record["id"]} if "id" in record else {}),
            "prompt": record["prompt"],
            "completion": record["response"],
            "fields": {"is_safe": safe, "category": _categories(record.get("category"))},
        }


def _categories(value: Any) -> str:
    """Return the harm categories of an answer; empty for a safe one."""
    if isinstance(value, Mapping):
        return ", ".join(sorted(name for name, applies in value.items() if applies))
    return value if isinstance(value, str) else ""
