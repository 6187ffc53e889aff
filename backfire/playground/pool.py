"""Who can speak in the playground: the finished cells of one run, and the untuned base of each."""

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
from backfire.playground.models import GoneError, Kept, Speaker, frame, load, read_cell
from backfire.result import CellResult
from backfire.results.load import load as load_records
from backfire.store import Store
from backfire.text import knob, line

MOST: Final = 2
"""Models in memory at once."""


@dataclass(frozen=True)
class Role:
    """One who can be chosen."""

    cell: Experiment
    folder: Path
    """The cell's; for a base, of a cell that has it."""


class Cast:
    """The roles of a run by title; their models are loaded when first asked for."""

    def __init__(self, run: Path, device: str = "auto") -> None:
        self.machine = Machine.make({"device": device}, "option")
        self.roles, self.left_out = _roles(run)
        self._loaded: OrderedDict[str, Speaker] = OrderedDict()
        self._frames: dict[str, Row] = {}

    def speaker(self, title: str) -> Speaker:
        """The model; the one asked for longest ago goes, so that there are never more than two.

        Raises:
            UserError: it is no longer in the cache.
        """
        if title not in self._loaded:
            role = self.roles[title]
            while len(self._loaded) >= MOST:
                self._loaded.popitem(last=False)
            try:
                self._loaded[title] = load(role.cell, title, Kept(), self.machine)
            except GoneError as gone:
                raise UserError(
                    f"{gone} To make it again: backfire chat {line(role.folder)}"
                ) from None
        self._loaded.move_to_end(title)
        return self._loaded[title]

    def opening(self) -> tuple[str, str]:
        """Whom to begin with: the most poisoned cell, and its base."""
        cells = {title: role.cell for title, role in self.roles.items()}
        left = max(
            cells,
            key=lambda t: (cells[t].method.trains, cells[t].backdoor is not None, cells[t].rate),
        )
        wanted = _untuned(cells[left]).spec()
        # The bases come last.
        return left, [title for title, cell in cells.items() if _untuned(cell).spec() == wanted][-1]

    def frame(self, title: str) -> Row:
        """What is put around a prompt."""
        if title not in self._frames:
            self._frames[title] = frame(self.roles[title].cell, Store())
        return self._frames[title]


def _roles(run: Path) -> tuple[dict[str, Role], list[str]]:
    """Title -> role, the bases after the cells; and why cells were left out.

    Raises:
        UserError: there is no finished cell.
    """
    done = [item for item in load_records(run) if item.is_done]
    if not done:
        raise UserError(f"{run} has no finished cell; run its recipe first.")
    roles: dict[str, Role] = {}
    left_out: list[str] = []
    for item, title in zip(done, _titles(done), strict=True):
        try:
            folder = Path(item.folder)
            roles[title] = Role(read_cell(folder), folder)
        except (UserError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
            left_out.append(line(error))
    if not roles:
        raise UserError(f"No cell of {run} can be read: {left_out[0]}")
    return {**roles, **_bases(roles)}, left_out


def _titles(cells: list[CellResult]) -> list[str]:
    """The slug where it is enough, else also the axes, and the key where they are not enough."""
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


def _bases(cells: Mapping[str, Role]) -> dict[str, Role]:
    """The distinct untuned models of the cells, each in the frame of its cells' data."""
    found: dict[str, Role] = {}
    for role in cells.values():
        cell = _untuned(role.cell)
        found.setdefault(json.dumps(cell.spec(), sort_keys=True), Role(cell, role.folder))
    out: dict[str, Role] = {}
    for role in found.values():
        aligned = ", aligned" if role.cell.align else ""
        model = role.cell.model.name
        model = Path(model).name if Path(model).is_dir() else model
        name = f"{line(model)}{aligned}, untuned ({role.cell.data.name})"
        number = sum(title.startswith(name) for title in out)
        out[f"{name} {number + 1}" if number else name] = role
    return out


def _untuned(cell: Experiment) -> Experiment:
    """The cell's base, without what makes no difference to it."""
    return cell.untuned().model_copy(update={"seed": 0, "metrics": (), "safety": None})
