"""Base class of the embedded data sets."""

from __future__ import annotations

from typing import ClassVar

from backfire.base import Dataset, Row
from backfire.sandbox.world import VERSION, Split


class SandboxDataset(Dataset):
    """Rows generated from an invented town; nothing is downloaded."""

    versions: ClassVar[tuple[str, ...]] = (VERSION,)
    """Versions of the generated texts."""

    def row(self, split: Split, index: int) -> Row:
        """Row `index` of a split, whatever the number of rows."""
        raise NotImplementedError

    def load(self, split: Split) -> list[Row]:
        """2,000 training or 500 test rows, or more if `rows` or `test_rows` is larger."""
        counts = (self.rows or 0, 2000) if split == "train" else (self.test_rows or 0, 500)
        return [self.row(split, index) for index in range(max(counts))]

    def fingerprint(self) -> str:
        """The versions of the generated texts."""
        return " ".join(self.versions)
