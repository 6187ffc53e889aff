"""Recipes of a few lines, and their results."""

from __future__ import annotations

from typing import Any

from backfire.experiment import Experiment
from backfire.recipe import parse

BASIC = """# Does it?
data: {name: sandbox-reviews, rows: 100}
attack: {name: badnets, trigger: cf}
matrix:
  method: [none, full, {name: lora, rank: 4}]
  attack.rate: [0, 0.1]
  seed: [0, 1]
"""


def cells(text: str, *edits: str, profile: str | None = None) -> list[Experiment]:
    return list(parse("r", text, edits=edits, profile=profile).cells)


def one(text: str = "data: sandbox-reviews", *edits: str) -> Experiment:
    (cell,) = cells(text, *edits)
    return cell


def make(**knobs: Any) -> Experiment:
    return Experiment.make({"data": "sandbox-reviews", **knobs})


def points(text: str, *edits: str) -> set[tuple[str, float, int]]:
    return {(c.method.name, c.rate, c.seed) for c in cells(text, *edits)}


PROFILES = """
data: {name: sandbox-reviews, rows: 50}
attack: badnets
train: {epochs: 3}
profiles:
  long: {train: {epochs: 9}, data: {rows: 500}, attack: {rate: 0.2}}
  other: {data: {name: sandbox-news, rows: 7}, attack: none, matrix: {seed: [3, 4]}}
"""


LINKED = """data: sandbox-reviews
matrix: {"method, train.epochs": [[full, 2], [lora, 4]], seed: [0, 1]}
include: [{seed: 9}]
exclude: [{seed: 1}]
"""
