"""The plan of a run in its folder: `recipe.yaml`, `run.json` with its cells, `jobs.json` with its
jobs. Imports no torch.

A worker needs nothing else: `jobs.json` has the resolved settings of every job. Its date is when
the present round began; what failed before is tried again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfire import __version__
from backfire.data import recipe_files
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.launch.remote import probe
from backfire.launch.users import register
from backfire.locks import locked
from backfire.model.types import types_here
from backfire.plan import Job
from backfire.recipe import Recipe
from backfire.registry import loaded
from backfire.results.plugins import missing
from backfire.store import cache_root, read_json, write_atomic, write_json
from backfire.text import without_tokens

JOBS = "jobs.json"
_FORMAT = 1
_ID = re.compile(r"(base|train|cell)-[0-9a-f]{1,64}")


@dataclass(frozen=True)
class Plan:
    """The content of `jobs.json`."""

    recipe: str
    """Name of the recipe."""
    jobs: list[Job]
    device: str
    """Kind of device that `auto` types were resolved for: `cpu` or `cuda`."""
    compute: str
    """Type of matrix products for which the key of the embedded base was computed."""
    text: str = ""
    """Text of the recipe."""
    folder: str = ""
    """Where it was planned: relative paths of its settings begin there."""
    cache: str = ""
    """What the probe of the cache said there; empty if the cache could not be written."""
    keyed: tuple[str, ...] = ()
    """Hosts of judges for which a key was at hand there."""


def check_writable(run: Path) -> None:
    """Refuse a run folder in which nothing can be written, and a cache that cannot be created;
    nothing is created here.

    Raises:
        UserError: there is a file in its place, or it is somebody else's.
    """
    cache = cache_root()
    for place, what, instead in (
        (run, "run folder", "choose another --out"),
        (cache, "cache", "set BACKFIRE_CACHE to another folder"),
    ):
        there = next(one for one in (place, *place.absolute().parents) if os.path.lexists(one))
        if not there.is_dir():
            raise UserError(f"The {what} {place} cannot be written: {there} is a file; {instead}.")
        if place == cache and cache.is_dir():
            continue  # it may hold all that the run needs
        if not os.access(there, os.W_OK | os.X_OK):
            sentence = f"The {what} {place} cannot be written: {there} is read-only for this user"
            raise UserError(f"{sentence}; {instead}.")


def write_plan(
    path: Path,
    recipe: Recipe,
    jobs: Sequence[Job],
    *,
    device: str = "cpu",
    profile: str | None = None,
    edits: Sequence[str] = (),
) -> None:
    """Create or extend a run's folder, and begin a new round. Calls with the same recipe text add
    up, so that several launchers may each plan a part."""
    path.mkdir(parents=True, exist_ok=True)
    with locked(path / ".plan"):
        kept = without_tokens(recipe.text)
        same, again = _text(path / "recipe.yaml") == kept, _former(path / "run.json")
        former, known = (again, _former(path / JOBS)) if same else ({}, {})
        if not same:
            write_atomic(path / "recipe.yaml", kept)
        cells = [f"{job.title}-{job.key}" for job in jobs if job.kind == "cell"]
        listed = {"cells": list(dict.fromkeys([*_list(former, "cells"), *cells]))}
        run = {"id": again.get("id") or secrets.token_hex(8), "recipe": recipe.name}
        run |= {"profile": profile, "edits": list(edits), **listed}
        paths = {plugin.sha256: str(plugin.path) for plugin in loaded() if plugin.path}
        plugins = [{**one, "path": paths.get(one["sha256"])} for one in plugins_of(recipe.cells)]
        if known.get("backfire") == __version__ and known.get("format") == _FORMAT:
            plugins += [one for one in _list(former, "plugins") if one not in plugins]
            former_jobs = {one["id"]: one for one in _list(known, "jobs")}
        else:
            former_jobs = {}
        write_json(path / "run.json", run | ({"plugins": plugins} if plugins else {}))
        head = {"format": _FORMAT, "backfire": __version__, "recipe": recipe.name}
        head |= {"device": device, "compute": types_here().compute, "plugins": plugins}
        head |= {"folder": str(Path.cwd()), "cache": _probe(), "keyed": _keyed(recipe)}
        # A former job keeps its place, so each comes after those that it needs.
        all_jobs = former_jobs | {job.id: _as_json(job) for job in jobs}
        _write(path / JOBS, head, list(all_jobs.values()))
    register(path, kept, jobs)


def read_plan(path: Path) -> Plan:
    """The plan of a run.

    Raises:
        UserError: there is none, it cannot be read, or it was written by another version.
    """
    file, again = path / JOBS, f"run `backfire plan RECIPE --out {path}` again."
    try:
        content = read_json(file)
        version, form = content["backfire"], content["format"]
        if (version, form) != (__version__, _FORMAT):
            raise UserError(
                f"{file} was written by backfire {version}, and this is {__version__}; {again}"
            )
        if lost := missing(content["plugins"]):
            raise UserError(lost[0])
        jobs = [_from_json(one, str(file)) for one in content["jobs"]]
        recipe, device, compute = (str(content[name]) for name in ("recipe", "device", "compute"))
        where, cache = (str(content.get(name, "")) for name in ("folder", "cache"))
        text, keyed = _text(path / "recipe.yaml") or "", tuple(map(str, content.get("keyed", ())))
        return Plan(recipe, jobs, device, compute, text, where, cache, keyed)
    except NotADirectoryError:
        plan = f"plan a recipe first: `backfire plan {path} --out RUN`"
        raise UserError(f"{path} is a file, and no folder of a run; {plan}.") from None
    except FileNotFoundError:
        sentence = f"No plan in {path}: jobs.json is missing; {again}"
        raise UserError(sentence) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} cannot be read; {again}") from None


def _probe() -> str:
    with suppress(UserError):
        return probe().content
    return ""


def _keyed(recipe: Recipe) -> list[str]:
    """Hosts of the recipe's judges for which there is a key here."""
    found = set[str]()
    for judge in (judge for cell in recipe.cells for judge in cell.judges):
        with suppress(UserError):
            if (host := judge.reaches()) and host[1]:
                found.add(host[0])
    return sorted(found)


def _as_json(job: Job) -> dict[str, Any]:
    content = {name: value for name, value in vars(job).items() if value not in (None, (), {})}
    return content | {"experiment": job.experiment.resolved()}


def _from_json(content: dict[str, Any], where: str) -> Job:
    experiment = Experiment.make(content["experiment"], where)
    after = tuple(map(str, content.get("after", ())))
    if not all(map(_ID.fullmatch, (content["id"], *after))):  # they are names of files
        raise ValueError
    return Job(**{"axes": {}, **content, "experiment": experiment, "after": after})


def _write(path: Path, head: dict[str, Any], jobs: Sequence[dict[str, Any]]) -> None:
    """One job per line: a few thousand stay readable."""
    lines = ",\n".join(json.dumps(job, ensure_ascii=False, allow_nan=False) for job in jobs)
    start = json.dumps(head, ensure_ascii=False, allow_nan=False).removesuffix("}")
    recipe_files.keep(lines)
    write_atomic(path, f'{start},\n"jobs": [\n{lines}\n]}}\n')


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _former(path: Path) -> dict[str, Any]:
    """A file of the former plan; empty if it cannot be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _list(content: dict[str, Any], name: str) -> list[Any]:
    value = content.get(name)
    return value if isinstance(value, list) else []


def plugins_of(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The plug-ins with a component that these experiments use."""
    plugins = loaded()
    named = {name for e in experiments for name in _names(e.resolved())} if plugins else set()
    return [facts for plugin in plugins if (facts := plugin.facts(named))["components"]]


def _names(value: Any) -> Iterator[str]:
    """Every `name: ...` in a tree of settings."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        if isinstance(value.get("name"), str):
            yield value["name"]
        for item in value.values():
            yield from _names(item)
