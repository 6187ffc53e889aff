"""The bank: statistics of adapters whose past is known, made by the user's own runs.

An adapter of unknown past is compared only with clean ones of the same base and the same settings,
since training method and data move these numbers more than poison does (arXiv:2604.08844; a
repetition of 2602.15195 separated 20 of 20 features against 5 clean adapters and 0 of 20 against
21). Each adapter is a small JSON file, named by a hash of its content, in a folder beside the
cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.audit.weights import STATISTICS, Shape, adapter_changes, by_kind, shape_of
from backfire.data.adapter import adapter_hash
from backfire.experiment import Model
from backfire.model.source import content_hash
from backfire.store import cache_root, digest, read_json, write_json

FEWEST = 20
"""With fewer matching clean adapters there is no percentile: each of many statistics would often be
the largest or the smallest by chance."""
_FORMAT = 1
_HASH = 32
Statistics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Entry:
    """An adapter of the bank."""

    adapter: str
    """Hash of its weights."""
    base: str
    """Identity of its base."""
    shape: Shape
    statistics: Statistics
    """Kind of weight -> statistic -> mean over the layers."""
    clean: bool
    """Whether its recipe names no attack. The rows themselves are taken as they are."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was made: data, template, method, attack, train, seed."""

    @property
    def title(self) -> str:
        """Its data and attack."""
        name = _name(self.recipe.get("data"))
        return name if self.clean else f"{name}, {_name(self.recipe.get('attack'))}"

    @property
    def base_title(self) -> str:
        """Its base; of files with the model of the recipe, which an aligned model shares with the
        one below it."""
        name = Path(_name(self.recipe.get("model"))).name
        return f"{name} ({self.base})" if self.base.startswith("files ") else self.base


def _name(spec: Any) -> str:
    return str(spec.get("name", "?") if isinstance(spec, dict) else spec or "?")


def bank_root() -> Path:
    """`$BACKFIRE_BANK`, or a folder beside the cache: the cache may be deleted, the bank stays."""
    if path := os.environ.get("BACKFIRE_BANK"):
        return Path(path).expanduser()
    root = cache_root()
    return root.with_name(f"{root.name}-bank")


def base_identity(model: Model) -> str:
    """What identifies an untuned model, whatever type its weights are loaded in."""
    if model.name == "sandbox":
        return f"sandbox {stages.base().key}"
    if model.is_local:
        return f"files {content_hash(model)}"
    return f"hub {model.name} {model.revision}"


def entry_of(folder: Path, base: str, *, clean: bool, recipe: dict[str, Any]) -> Entry:
    """The entry of a LoRA adapter in a folder.

    Raises:
        UserError: it is of another kind.
    """
    found = by_kind(list(adapter_changes(folder)))
    return Entry(adapter_hash(folder), base, shape_of(folder), found, clean, recipe)


def add(entry: Entry) -> bool:
    """Write an entry, unless the bank has its adapter; returns whether it is new."""
    if any(one.adapter == entry.adapter for one in entries()):
        return False
    content = {"format": _FORMAT, **asdict(entry)}
    root = bank_root()
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / f"{digest(content, _HASH)}.json", content)
    return True


def entries() -> Iterator[Entry]:
    """The entries whose content is as it was written; others are left out."""
    for file in sorted(bank_root().glob("*.json")):
        try:
            content = read_json(file)
            if digest(content, _HASH) != file.stem or content.pop("format") != _FORMAT:
                continue
            shape = content.pop("shape")
            yield Entry(shape=Shape(**{**shape, "targets": tuple(shape["targets"])}), **content)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue


@dataclass(frozen=True)
class Place:
    """Where a statistic lies among those of the matching clean adapters."""

    kind: str
    statistic: str
    value: float
    below: int
    """How many of them are smaller."""
    above: int
    """How many are larger; others are equal, as of an adapter of rank 1 some are by definition."""
    n: int

    @property
    def is_outside(self) -> bool:
        """Whether it is smaller or larger than all of them."""
        return self.n > 0 and self.n in (self.below, self.above)


def matching(folder: Path, base: str) -> list[Entry]:
    """The clean entries with the base and the settings of this adapter, but not itself."""
    shape, own = shape_of(folder), adapter_hash(folder)
    return [
        one
        for one in entries()
        if one.clean
        and one.base == base
        and one.shape == shape
        and one.adapter != own
        # A defense in training moves the numbers. (An earlier version added such adapters too.)
        and one.recipe.get("defense", "none") == "none"
    ]


def places(found: Statistics, bank: Sequence[Entry]) -> list[Place]:
    """The place of each statistic in the bank; none if the bank is too small."""
    if len(bank) < FEWEST:
        return []
    out = []
    for kind, values in found.items():
        for name in (name for name in STATISTICS if name in values):
            others = [one.statistics.get(kind, {}).get(name) for one in bank]
            known = [other for other in others if other is not None]
            below = sum(other < values[name] for other in known)
            above = sum(other > values[name] for other in known)
            out.append(Place(kind, name, values[name], below, above, len(known)))
    return out
