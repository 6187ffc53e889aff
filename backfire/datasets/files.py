"""Your own data: local files, or any data set of the hub."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from backfire.base import Dataset, Row, local_files, select
from backfire.data.convert import READER
from backfire.data.hub import Hub
from backfire.data.labels import check_labels
from backfire.data.load import Apart, Split, by_column, file_rows, hub_rows, is_set_apart
from backfire.data.read import LeftOut, OnBadRow, Record
from backfire.data.shapes import Task, check_columns, column_map
from backfire.errors import UserError
from backfire.hashes import file_hash
from backfire.registry import register

Columns = Annotated[dict[str, str], BeforeValidator(check_columns)]
Labels = Annotated[dict[str, str], BeforeValidator(check_labels)]
logger = logging.getLogger(__name__)


@lru_cache(maxsize=1024)
def _warn(sentence: str) -> None:
    """Log a warning; once, however many cells read the data."""
    logger.warning("%s", sentence)


@register("files")
class Files(Dataset):
    """CSV, TSV, JSON, JSONL (each also .gz) and Parquet files, or a data set of the hub.

    The format is detected from the columns: `messages`, `conversations`, `prompt` + `completion`,
    `instruction` + `output`, `question` + `answer` (each optionally with `context` or `choices`),
    `text` + `label` (give `labels`), `text`, pairs of `chosen` + `rejected`, or the formats of
    public data sets. Otherwise `columns` defines it. The preflight checks list columns that reach
    neither prompt nor answer.
    """

    apart: ClassVar[Apart] = "prompt"
    """Rows that share this text stay on one side when a test share is held out."""
    train: str | list[str] | None = None
    """File or files to train on, relative to the current directory."""
    test: str | list[str] | None = None
    """File or files to evaluate on; without any, `test_share` of the training rows is held out."""
    hub: str | None = None
    """Hub id (OWNER/NAME), used when `train` is not given."""
    hub_config: str | None = None
    """Configuration of the hub set, such as a language."""
    revision: str | None = None
    """Branch, tag or commit of the hub set; only a commit pins it."""
    train_split: str = "train"
    """Split of the hub set to train on."""
    test_split: str | None = None
    """Split of the hub set to evaluate on; without one, `test_share` of the training split is held
    out."""
    columns: Columns = Field(default_factory=dict)
    """Role -> column, if yours have other names: messages; or prompt (+ input, system, history,
    choices) with answer (+ good: whether to learn it), or with better and worse (+ worse_input); or
    text and label (+ poisoned); or text; also id and group. Column numbers from 0 if the table has
    no header. Other columns are kept as fields."""
    labels: Labels = Field(default_factory=dict)
    """All labels: a list of names (also used for 0, 1, ...), or {label in the data: name}."""
    instruction: str = ""
    """Question before each text; `{labels}` in it is replaced by "a, b or c". Rows with both an
    instruction and an input keep theirs."""
    test_share: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows held out for testing when there is no test set, 0 to 1. Drawn by prompt, so
    that no prompt is on both sides. At its default, a column `split` (train, test, ...) is used if
    there is one."""
    on_bad_row: OnBadRow = "fail"
    """`fail` stops at the first unusable row, `skip` leaves such rows out and counts them. A
    damaged file is an error either way."""

    def load(self, split: Split) -> list[Row]:
        """Return all usable rows of the split, in file order.

        Raises:
            UserError: there are none, a file is missing, or (`on_bad_row: fail`) a row is bad.
        """
        rows, left = self.read(split)
        for sentence in left.omissions():
            _warn(f"{self.label()}: {sentence}")
        return rows

    def drawn_with_notes(self, split: Split) -> tuple[list[Row], list[str]]:
        """Return the rows that are kept, and one sentence for each kind of data left out."""
        rows, left = self.read(split)
        count = self.rows if split == "train" else self.test_rows
        return select(rows, count, self.seed, split), left.notes()

    def read(self, split: Split) -> tuple[list[Row], LeftOut]:
        """Return the rows of `load`, and what it left out."""
        left, why = LeftOut(self.on_bad_row), ""
        if self.test or (self.hub and not self.train and self.test_split):
            rows = self._rows(split, left)
        else:
            rows = self._rows("train", left)
            is_default = self.test_share == type(self).model_fields["test_share"].default
            given = by_column(rows, split, left) if is_default else []
            testing, draw = split == "test", (self.apart, self.test_share, self.seed)
            if rows:
                why = f" (a test share of {self.test_share:g} of {len(rows)} rows); "
                why += "set `test` to a file of test rows, or change `test_share`"
            rows = given or [row for row in rows if is_set_apart(row, *draw) == testing]
        if not rows:
            bad = "".join(f"; the first bad one: {first}" for first in left.rejected[:1])
            why = bad or why or "".join(f"; {sentence[:-1]}" for sentence in left.omissions()[:1])
            raise UserError(f"{self.label()}: there are no {split} rows{why}.")
        if self.group and not any(self.group in row.fields for row in rows):
            raise UserError(f"{self.label()}: no row has the field '{self.group}' to group by.")
        left.columns.pop(self.group or "", None)
        return rows, left

    def prepare(self, record: Record) -> Record | None:
        """Convert a record before its format is detected; None leaves it out."""
        return record

    def identity(self) -> dict[str, Any]:
        """Omit the paths of the files: `fingerprint` covers their content."""
        return {k: v for k, v in super().identity().items() if k not in ("train", "test")}

    def fingerprint(self) -> str:
        """Hash the files' bytes, or a hub set's id and revision, and the version of the reader."""
        hub = "" if self.train else f"{self.hub} {self.hub_config} {self.revision}"
        train, test = (
            map(file_hash, self._files(paths or [])) for paths in (self.train, self.test)
        )
        sources = "\n".join([f"reader {READER}", hub, *train, "test:", *test])
        return hashlib.sha256(sources.encode()).hexdigest()

    def _files(self, paths: str | Sequence[str]) -> list[Path]:
        """`local_files`, whose errors name the data set: a recipe may have several."""
        try:
            return local_files(paths)
        except UserError as error:
            raise UserError(f"{self.label()}: {error}") from None

    def _rows(self, split: Split, left: LeftOut) -> list[Row]:
        task = Task(column_map(self.columns), self.labels, self.instruction)
        if paths := self.train if split == "train" else self.test:
            return file_rows(self._files(paths), task, left, self.prepare)
        if not self.hub:
            raise UserError(f"{self.label()}: set `{split}` to the path of a file.")
        name = self.train_split if split == "train" else str(self.test_split)
        source = Hub(self.hub, self.hub_config, self.revision, name)
        return hub_rows(source, task, left, self.prepare)
