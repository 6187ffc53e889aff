"""The models of a run that the playground offers: its finished cells and their untuned bases."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from backfire.base import Row
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine
from backfire.launch.job import read_cell
from backfire.playground.models import (
    ChatModel,
    NotCachedError,
    ReadOnlyStore,
    frame,
    load,
)
from backfire.result import CellResult
from backfire.results.load import load as load_records
from backfire.store import Store
from backfire.text import knob, line

MAX_LOADED: Final = 2
"""Largest number of models in memory."""


@dataclass(frozen=True)
class Choice:
    """A selectable model."""

    experiment: Experiment
    folder: Path
    """The cell folder; for a base, that of a cell built on it."""


class ModelPool:
    """The selectable models of a run by title, loaded on first use."""

    def __init__(self, run: Path, device: str = "auto") -> None:
        self.machine = Machine.make({"device": device}, "option")
        self.choices, self.skipped = _choices(run)
        self._loaded: OrderedDict[str, ChatModel] = OrderedDict()
        self._frames: dict[str, Row] = {}

    def model(self, title: str) -> ChatModel:
        """Load a model; the least recently used one is released when there are too many.

        Raises:
            UserError: the model is no longer in the cache.
        """
        if title not in self._loaded:
            choice = self.choices[title]
            while len(self._loaded) >= MAX_LOADED:
                self._loaded.popitem(last=False)
            try:
                self._loaded[title] = load(choice.experiment, title, ReadOnlyStore(), self.machine)
            except NotCachedError as error:
                raise UserError(
                    f"{error} To rebuild it: backfire chat {line(choice.folder)}"
                ) from None
        self._loaded.move_to_end(title)
        return self._loaded[title]

    def default_pair(self) -> tuple[str, str]:
        """The titles shown first: the cell with the highest poison rate, and its base."""
        cells = {title: choice.experiment for title, choice in self.choices.items()}
        left = max(
            cells,
            key=lambda t: (cells[t].method.trains, cells[t].backdoor is not None, cells[t].rate),
        )
        base = _untuned(cells[left]).spec()
        # Bases are listed last.
        return left, [title for title, cell in cells.items() if _untuned(cell).spec() == base][-1]

    def frame(self, title: str) -> Row:
        """The task around a prompt; see `models.frame`."""
        if title not in self._frames:
            self._frames[title] = frame(self.choices[title].experiment, Store())
        return self._frames[title]


def _choices(run: Path) -> tuple[dict[str, Choice], list[str]]:
    """Choices by title, bases after cells; and an error message for each skipped cell.

    Raises:
        UserError: there is no finished cell.
    """
    done = [item for item in load_records(run) if item.is_done]
    if not done:
        raise UserError(f"{run} has no finished cell; run its recipe first.")
    choices: dict[str, Choice] = {}
    skipped: list[str] = []
    for item, title in zip(done, _titles(done), strict=True):
        try:
            folder = Path(item.folder)
            choices[title] = Choice(read_cell(folder), folder)
        except (UserError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
            skipped.append(line(error))
    if not choices:
        raise UserError(f"No cell of {run} can be read: {skipped[0]}")
    return {**choices, **_bases(choices)}, skipped


def _titles(cells: list[CellResult]) -> list[str]:
    """Unique titles: the slug, with its matrix axes or its key where needed."""
    slugs = [line(item.slug) for item in cells]
    longer = [f"{slug} ({knob(item.axes)})" for slug, item in zip(slugs, cells, strict=True)]
    keyed = [
        f"{slug} {line(Path(item.folder).name)[-12:]}"
        for slug, item in zip(longer, cells, strict=True)
    ]
    seen, seen_longer = Counter(slugs), Counter(longer)
    return [
        slug if seen[slug] == 1 else long if seen_longer[long] == 1 else key
        for slug, long, key in zip(slugs, longer, keyed, strict=True)
    ]


def _bases(cells: Mapping[str, Choice]) -> dict[str, Choice]:
    """The distinct untuned models of the cells, by title."""
    bases: dict[str, Choice] = {}
    for choice in cells.values():
        base = _untuned(choice.experiment)
        bases.setdefault(json.dumps(base.spec(), sort_keys=True), Choice(base, choice.folder))
    out: dict[str, Choice] = {}
    for choice in bases.values():
        aligned = ", aligned" if choice.experiment.align else ""
        title = line(choice.experiment.model.short_title)
        name = f"{title}{aligned}, untuned ({choice.experiment.data.name})"
        number = sum(title.startswith(name) for title in out)
        out[f"{name} {number + 1}" if number else name] = choice
    return out


def _untuned(experiment: Experiment) -> Experiment:
    """The experiment's base, without the settings that do not affect it."""
    return experiment.untuned().model_copy(update={"seed": 0, "metrics": (), "safety": None})
