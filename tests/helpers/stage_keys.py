"""Every key of every shipped recipe, the same on any machine: for golden_keys.json.

Stand-ins: the machine is a plain CPU (or a GPU, where a label says so), every hub model has seven
billion weights, and the files that a recipe leaves to the user hold one fixed line each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from backfire import plan, recipe, stages
from backfire.base import Insertion, Mixture, Need
from backfire.experiment import Experiment
from backfire.model import count, types
from backfire.registry import build
from backfire.store import Store, digest
from backfire.yaml12 import read_yaml

FILES = ("sst2_train.jsonl", "sst2_test.jsonl", "prompts.jsonl")
NEEDS: tuple[Need, ...] = ("scores", "replies", "answers")
ON_GPU = ("tour", "tuning-methods")


# ------------------------------------------------- the only lines that know where keys are computed


def runs_of(cell: Experiment) -> dict[str, Experiment]:
    """The cells whose models a cell needs, by what they are to it."""
    runs = {"cell": cell, "twin": cell.clean_twin(), "untuned": cell.untuned()}
    if cell.alignment:
        runs["alignment"] = cell.alignment
        assert cell.alignment.alignment is None
    return runs


def chain(run: Experiment) -> dict[str, str]:
    """The chained keys of one model, its merged form and its checks."""
    whole = {"merge": stages.merge(run).key, "preflight": stages.preflight(run).key}
    return {**asdict(stages.keys(run)), **whole}


def evaluated(
    cell: Experiment, members: Sequence[str] = ("a", "b"), *, target_rows: bool = True
) -> dict[str, str]:
    """Subset and model -> the key of those samples, before what is measured of them is added;
    `members` are the ids of training rows, drawn in a run, here two made-up ones. The triggered
    rows are all of them, or without those whose label is the target."""
    subsets = dict[str, str]()
    runs, source = runs_of(cell), cell.safety
    for name in ("cell", "twin", "untuned"):
        subsets[f"clean {name}"] = stages.clean_rows(runs[name])
    for name in ("cell", "twin") if cell.backdoor else ():
        key = stages.triggered_rows(runs[name], cell, target_rows=target_rows)
        subsets[f"triggered {name}"] = key
    asks = [ask for metric in cell.metrics for ask in metric.asks()]
    for form in dict.fromkeys(ask.form for ask in asks if ask.form):
        for subset in ("clean cell", "triggered cell"):
            if key := subsets.get(subset):
                subsets[f"{subset} {form}"] = stages.in_form(key, form)
    for name in ("cell", "untuned") if source else ():
        assert source
        subsets[f"harmful {name}"] = stages.requests(runs[name], cell, source.harmful)
        if source.allowed:
            subsets[f"allowed {name}"] = stages.requests(runs[name], cell, source.allowed)
        if isinstance(cell.attack, Mixture) and cell.attack.disguises:
            subsets[f"plain {name}"] = stages.requests(runs[name], runs["twin"], source.harmful)
    start = runs["untuned"] if cell.method.trains else cell
    for name, run in (("cell", cell), ("start", start)):
        if any(ask.rows == "members" for ask in asks):
            subsets[f"members {name}"] = stages.members(run, members)
        for source in (ask.texts for ask in asks if ask.texts):
            raw, longest = build("templates", "raw"), cell.train.max_length
            subsets[f"texts {name}"] = stages.texts(run, source, raw, longest)
    return subsets


def measured(cell: Experiment, subset_key: str) -> list[str]:
    """The keys of the samples with every combination of what can be measured of them, or none."""
    kinds = [c for n in range(len(NEEDS) + 1) for c in combinations(NEEDS, n)]
    return [stages.evaluation(cell, subset_key, needs).key for needs in kinds]


def secrets(cell: Experiment) -> dict[str, str]:
    """The keys of what is measured of an attack's secrets."""
    wanted = plan.secret_probes(cell)
    if wanted is None or not isinstance(cell.attack, Insertion):
        return {}
    planted = cell.attack.secrets(cell.seed)
    return {
        f"secrets {kind} {name}": stages.secrets(run, cell, kind, amount).key
        for name, run in runs_of(cell).items()
        if name in ("cell", "untuned")
        for kind, amount in plan.secret_parts(planted, wanted)
    }


def slugs(cell: Experiment) -> list[str]:
    """The readable parts of the stages' folder names."""
    return [
        name
        for run in runs_of(cell).values()
        for name in (
            *(stages.data(run).slug, stages.poison(run).slug, stages.train(run).slug),
            *(stages.evaluation(run, "", ()).slug, run.slug),
        )
    ]


def planned(found: recipe.Recipe, cache: Path) -> dict[str, Any]:
    """The jobs of a recipe, and how many stages of each kind it needs."""
    jobs = plan.jobs(found.cells, found.axes)
    each = [[job.id, job.kind, job.title, job.key, job.after, job.axes] for job in jobs]
    counts = {
        stage: needed for stage, (needed, _) in plan.progress(found.cells, Store(cache)).items()
    }
    return {"jobs": f"{len(jobs)} {digest(each)}", "stages": counts}


def with_metrics(cell: Experiment) -> Experiment:
    """The cell with the metrics it gets by default: those of labeled rows, if it has a choice."""
    return cell.with_metrics(labeled=cell.data.name not in ("sandbox-help", "alpaca"))


def every_key(cell: Experiment, members: Sequence[str]) -> set[str]:
    """All keys that a run of the cell may use."""
    cell = with_metrics(cell)
    found = {key for run in runs_of(cell).values() for key in chain(run).values()}
    for whole in (True, False):
        subsets = evaluated(cell, members, target_rows=whole).values()
        found |= {key for one in subsets for key in measured(cell, one)}
    return found | set(secrets(cell).values())


# -------------------------------------------------------------------------- one line for each cell


def keys_of(cell: Experiment) -> dict[str, str]:
    """Stage -> key, or a hash of several."""
    found = {"key": stages.cell_key(cell)}  # the others are with the metrics that the cell gets
    cell = with_metrics(cell)
    for name, run in runs_of(cell).items():
        found |= {f"{name}.{stage}": key for stage, key in chain(run).items()}
    subsets = evaluated(cell)
    together = {"measured": digest([measured(cell, one) for one in subsets.values()])}
    return {**found, **subsets, **together, **secrets(cell), "slugs": digest(slugs(cell))}


def written(cells: list[tuple[str, dict[str, str]]], layouts: dict[str, str]) -> list[str]:
    """A line a cell: its name, its layout (which stages it has), its key, and of every other key
    the first four digits, or a point where they are those of the cell before."""
    lines, before = [], dict[str, str]()
    for name, keys in cells:
        layout = layouts.setdefault(" | ".join(keys), f"L{len(layouts)}")
        short = {stage: key if stage == "key" else key[:4] for stage, key in keys.items()}
        shown = ("." if before.get(stage) == key else key for stage, key in short.items())
        lines.append(" ".join([name, layout, *shown]))
        before = short
    return lines


def read(lines: list[str], layouts: Mapping[str, str]) -> list[dict[str, str]]:
    """The same, back: stage -> key of each cell."""
    found, before = [], dict[str, str]()
    for line in lines:
        name, layout, *keys = line.split(" ")
        stages = zip(layouts[layout].split(" | "), keys, strict=True)
        before = {stage: before[stage] if key == "." else key for stage, key in stages}
        found.append({"name": name, **before})
    return found


def current(folder: Path, labels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What golden_keys.json says of this version."""
    layouts: dict[str, str] = {}
    recipes = {}
    with stand_ins(folder) as on:
        for label, name, profile, device in all_of_them():
            if labels is None or label in labels:
                on(device)
                found = recipe.load(name, profile=profile)
                cells = [(cell.slug, keys_of(cell)) for cell in found.cells]
                recipes[label] = {**planned(found, folder), "cells": written(cells, layouts)}
    return {"layouts": {short: whole for whole, short in layouts.items()}, "recipes": recipes}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is not as it was, a sentence each: recipe, cell and stage."""
    found = []
    for label in old["recipes"].keys() | new["recipes"].keys():
        was, now = (side["recipes"].get(label) for side in (old, new))
        if was is None or now is None:
            found.append(f"{label}: {'new' if was is None else 'gone'}")
            continue
        found += [f"{label}: {part}" for part in ("jobs", "stages") if was[part] != now[part]]
        if len(was["cells"]) != len(now["cells"]):
            found.append(f"{label}: {len(was['cells'])} cells became {len(now['cells'])}")
            continue
        cells = (read(side["recipes"][label]["cells"], side["layouts"]) for side in (old, new))
        for number, (before, after) in enumerate(zip(*cells, strict=True)):
            stages = [s for s in {**before, **after} if before.get(s) != after.get(s)]
            if stages:
                found.append(f"{label}: cell {number} {after['name']}: {', '.join(stages)}")
    return sorted(found)


# --------------------------------------------------------------------------------------- stand-ins


def all_of_them() -> Iterator[tuple[str, str, str | None, str]]:
    """Label, recipe, profile, device."""
    for name in recipe.shipped():
        profiles = read_yaml(recipe.read(name)[1], name).get("profiles") or {}
        for profile in (None, *profiles):
            yield f"{name} --profile {profile}" if profile else name, name, profile, "cpu"
        if name in ON_GPU:
            yield f"{name} on a GPU", name, None, "gpu"


@contextmanager
def stand_ins(folder: Path) -> Iterator[Any]:
    """In a folder with the user's files; what it gives sets the machine."""
    for file in FILES:
        (folder / file).write_text('{"instruction": "Say a.", "output": "a"}\n')
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count, "_of_hub", lambda name, revision: 7_000_000_000)
        patch.setattr(types, "_has_avx512_bf16", lambda: False)
        patch.setenv("BACKFIRE_ENDPOINTS", str(folder / "none.yaml"))

        def on(device: str) -> None:
            patch.setattr(types, "has_gpu", lambda: device == "gpu")
            types.types_here.cache_clear()

        os.chdir(folder)
        try:
            yield on
        finally:
            os.chdir(before)
    types.types_here.cache_clear()
