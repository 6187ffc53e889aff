"""Which runs use the cache, so that what an unfinished one needs is not removed: `<cache>/runs` has
a file for each, which names its folder and its stages."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.data.recipe_files import KEPT
from backfire.errors import UserError
from backfire.plan import Job
from backfire.results.load import outcome
from backfire.store import cache_root, digest, mark_recent, read_json, write_json

FOLDER = "runs"
_SHARED = ("tokenizer", "base", "whole", "scanned", "judged", "hashes", KEPT)
"""Kinds of stages whose names do not tell which run needs them."""
_AWAY = 30 * 86400.0
"""Seconds since its last start after which an unfinished run whose folder is not to be found counts
as gone. Before, it may have been moved, or be on another host."""


@dataclass(frozen=True)
class User:
    """A run that uses the cache."""

    file: Path
    """What was read; removed when the run is gone."""
    run: Path
    host: str
    needs: frozenset[str]
    """Stages as `kind/slug-*`, `kind/*-key` or `kind/*`."""
    is_finished: bool
    """Whether all of it was done when a command last saw it."""
    id: str = ""
    """Of the run, as in its run.json; empty for a run of an earlier version."""

    @property
    def is_here(self) -> bool:
        """Whether it is the run in this folder: another host may have another run of this path."""
        return self.run.is_dir() and (not self.id or _id_of(self.run) == self.id)

    @property
    def is_gone(self) -> bool:
        """Whether its folder no longer exists, as far as can be told."""
        is_old = time.time() - self.file.stat().st_mtime > _AWAY
        return not self.is_here and (self.is_finished or is_old)

    def cells(self) -> tuple[int, int]:
        """Number of cells that are done, and in total; (0, 1) if the run cannot be read."""
        try:
            if not self.is_here:
                return 0, 1
            names = [str(name) for name in read_json(self.run / "run.json")["cells"]]
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 1
        return sum(outcome(self.run / "cells" / n)["status"] == "ok" for n in names), len(names)

    def needs_stage(self, kind: str, name: str) -> bool:
        """Whether it may need the stage with this folder name."""
        slug, _, key = name.rpartition("-")
        return not self.needs.isdisjoint({f"{kind}/*", f"{kind}/{slug}-*", f"{kind}/*-{key}"})


def register(run: Path, recipe: str, jobs: Iterable[Job]) -> None:
    """Write which stages a run needs; a later part of the same recipe's text adds its own. (Without
    a writable cache nobody can remove anything either.)"""
    file = _file_of(run)
    needs, known = set(map(str, needs_of(jobs))), _read(file)
    if known.get("recipe") == digest(recipe):
        needs |= set(known.get("needs", ()))
    content = {
        "run": str(run.resolve()),
        "id": _id_of(run),
        "host": socket.gethostname(),
        "recipe": digest(recipe),
        "needs": sorted(needs),
    }
    if content == known:
        mark_recent(file)
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def still_uses(run: Path, recipe: str, jobs: Iterable[Job]) -> None:
    """Write it again for a run that was moved, or that another host knows by another path."""
    if _read(file := _file_of(run)).get("recipe") == digest(recipe):
        mark_recent(file)
    else:
        register(run, recipe, jobs)


def has_finished(run: Path) -> None:
    """Note that all of a run is done: once its folder is removed, nothing is kept for it."""
    content = _read(file := _file_of(run))
    if content and not content.get("finished"):
        with contextlib.suppress(OSError):
            write_json(file, {**content, "finished": True})


def _file_of(run: Path) -> Path:
    where, id = str(run.resolve()), _id_of(run)
    return cache_root() / FOLDER / f"{digest([where, id] if id else where)}.json"


def _id_of(run: Path) -> str:
    """What tells a run from another of the same path on another host; empty if it has none."""
    return str(_read(run / "run.json").get("id", ""))


def needs_of(jobs: Iterable[Job]) -> set[str]:
    """The stages that jobs may need, as in `User.needs`. Trained models are named by their keys,
    which the jobs have; to find the keys of the others would take longer, and some depend on the
    rows."""
    needs = {f"{kind}/*" for kind in _SHARED}
    for job in jobs:
        if job.kind == "train":
            needs.add(f"train/*-{job.key}")
        elif job.kind == "cell":
            needs |= {f"{kind}/{slug}-*" for kind, slug in stages.slugs(job.experiment)}
    return needs


def users(root: Path) -> list[User]:
    """The runs that use this cache.

    Raises:
        UserError: a file about a run cannot be read.
    """
    found = []
    for file in sorted((root / FOLDER).glob("*.json")):
        content = _read(file)
        try:
            needs = frozenset(map(str, content["needs"]))
            where, finished = Path(content["run"]), bool(content.get("finished"))
            host, id = str(content["host"]), str(content.get("id", ""))
            found.append(User(file, where, host, needs, finished, id))
        except (KeyError, TypeError):
            raise UserError(
                f"{file} cannot be read, so what its run needs is unknown; remove it."
            ) from None
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
