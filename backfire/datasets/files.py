"""Your own data: local files, or any set of the hub."""

from __future__ import annotations

import hashlib
import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from backfire.base import Dataset, Row, local_files
from backfire.data.hub import Hub
from backfire.data.load import Apart, file_hash, file_rows, hub_rows, is_set_apart
from backfire.data.read import BadRows, OnBadRow, Record, Rejected
from backfire.data.shapes import Task, check_columns, check_labels, column_map
from backfire.errors import UserError
from backfire.registry import register

Split = Literal["train", "test"]
Columns = Annotated[dict[str, str], BeforeValidator(check_columns)]
Labels = Annotated[dict[str, str], BeforeValidator(check_labels)]
logger = logging.getLogger(__name__)


@register("files")
class Files(Dataset):
    """CSV, TSV, JSON, JSONL (each also .gz) and Parquet files, or a set of the hub.

    The shape is seen from the columns: `messages`, `conversations`, `prompt` + `completion`,
    `instruction` + `output`, `question` + `answer`, `text` (+ `label`; give `labels`), pairs of
    `chosen` + `rejected` or `better` + `worse`, or those of a public set. Else `columns` says it.
    """

    apart: ClassVar[Apart] = "prompt"
    """What rows have in common that must not be on both sides when a test share is set apart."""
    train: str | list[str] | None = None
    """File or files to train on, relative to the current directory."""
    test: str | list[str] | None = None
    """File or files to evaluate on; without any, `test_share` of the training rows is set apart."""
    hub: str | None = None
    """Hub id (OWNER/NAME), used when `train` is not given."""
    hub_config: str | None = None
    """Configuration of the hub set, such as a language."""
    revision: str | None = None
    """Branch, tag or commit of the hub set; only a commit pins it."""
    train_split: str = "train"
    """Split of the hub set to train on."""
    test_split: str | None = None
    """Split of the hub set to evaluate on; without one, `test_share` of the other is set apart."""
    columns: Columns = Field(default_factory=dict)
    """Role -> column, if yours have other names: messages; or prompt (+ input, system) with answer,
    or with better and worse (+ worse_input); or text and label; or text; also id and group. Numbers
    from 0 if the table has no header. Columns not named are kept as fields."""
    labels: Labels = Field(default_factory=dict)
    """All labels: a list of names (they also stand for 0, 1, ...), or {label in the data: name}."""
    instruction: str = ""
    """Put before each text; `{labels}` in it becomes "a, b or c". Rows that come with both an
    instruction and an input keep theirs."""
    test_share: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows set apart for testing when there is no test set, 0 to 1. Drawn by prompt,
    so that no prompt is on both sides."""
    on_bad_row: OnBadRow = "fail"
    """`fail` stops at the first row that cannot be used, `skip` leaves them out and says so."""

    def load(self, split: Split) -> list[Row]:
        """All usable rows of the split, in file order.

        Raises:
            UserError: there are none, a file is missing, or (`on_bad_row: fail`) a row is bad.
        """
        rows, rejected = self.read(split)
        if rejected:
            count, first = len(rejected), rejected[0]
            logger.warning("%s: %d bad rows left out, the first: %s", self.label(), count, first)
        return rows

    def read(self, split: Split) -> tuple[list[Row], list[Rejected]]:
        """What `load` gives, and what it left out."""
        bad = BadRows(self.on_bad_row)
        if self.test or (self.hub and not self.train and self.test_split):
            rows = self._rows(split, bad)
        else:
            testing = split == "test"
            rows = [
                row
                for row in self._rows("train", bad)
                if is_set_apart(row, self.apart, self.test_share, self.seed) == testing
            ]
        if not rows:
            why = "".join(f"; the first bad one: {first}" for first in bad.rejected[:1])
            raise UserError(f"{self.label()}: there are no {split} rows{why}.")
        if self.group and not any(self.group in row.fields for row in rows):
            raise UserError(f"{self.label()}: no row has the field '{self.group}' to group by.")
        return rows, bad.rejected

    def prepare(self, record: Record) -> Record | None:
        """A last look at each record before its shape is seen; None leaves it out."""
        return record

    def identity(self) -> dict[str, Any]:
        """Where the files lie does not matter: `fingerprint` covers what is in them."""
        return {k: v for k, v in super().identity().items() if k not in ("train", "test")}

    def fingerprint(self) -> str:
        """Hash of the bytes of the files; for a hub set, of its id and revision."""
        hub = "" if self.train else f"{self.hub} {self.hub_config} {self.revision}"
        train, test = (
            map(file_hash, local_files(paths or [])) for paths in (self.train, self.test)
        )
        return hashlib.sha256("\n".join([hub, *train, "test:", *test]).encode()).hexdigest()

    def _rows(self, split: Split, bad: BadRows) -> list[Row]:
        task = Task(column_map(self.columns), self.labels, self.instruction)
        if paths := self.train if split == "train" else self.test:
            return file_rows(local_files(paths), task, bad, self.prepare)
        if not self.hub:
            raise UserError(f"{self.label()}: give `{split}`, the path of a file.")
        name = self.train_split if split == "train" else str(self.test_split)
        source = Hub(self.hub, self.hub_config, self.revision, name)
        return hub_rows(source, task, bad, self.prepare)
