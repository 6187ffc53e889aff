"""Loads data sets of the Hugging Face hub as records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backfire.data.read import Record
from backfire.errors import UserError

CONVERTED = "refs/convert/parquet"
"""The hub's branch with Parquet files of sets that need a script; one folder per config."""


@dataclass(frozen=True)
class Hub:
    """One split of a data set on the hub."""

    id: str
    config: str | None
    revision: str | None
    split: str


def load_hub(hub: Hub) -> tuple[Iterator[tuple[int, Record]], Mapping[str, Sequence[str]]]:
    """The numbered records of a split, and the class names of the columns that have any.

    Downloads, or reads the cache under HF_HUB_OFFLINE=1. Code in the repository is never run.

    Raises:
        UserError: the set is missing, gated or unreachable, or has no such split.
    """
    folder = hub.config if hub.revision == CONVERTED else None
    try:
        import datasets

        data = datasets.load_dataset(
            hub.id,
            None if folder else hub.config,
            data_dir=folder,
            split=hub.split,
            revision=hub.revision,
        )
        features = getattr(data, "features", None) or {}
    except Exception as error:  # the library, the hub and the network raise their own classes
        raise UserError(_sentence(hub.id, error)) from None
    classes = {
        column: names
        for column, feature in features.items()
        if isinstance(names := getattr(feature, "names", None), list)
    }
    return _named(data, classes), classes


def _named(
    data: Sequence[Record], classes: Mapping[str, Sequence[str]]
) -> Iterator[tuple[int, Record]]:
    """The records with class names for class numbers; -1, a withheld label, becomes None."""
    for number, record in enumerate(data, 1):
        for column, names in classes.items():
            value = record[column]
            if isinstance(value, int):
                record[column] = names[value] if 0 <= value < len(names) else None
        yield number, record


def _sentence(hub: str, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).partition("\n")[0].rstrip(". ")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    hint = " (HF_HUB_OFFLINE is set, so it must be in the cache)" if offline else ""
    return (
        f"Data set '{hub}' cannot be loaded from the hub{hint}: {reason}; see "
        f"https://huggingface.co/datasets/{hub}; if it is gated, accept its terms and set HF_TOKEN."
    )
