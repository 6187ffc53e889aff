"""A small whole run: six cells of a tiny model, in a separate cache and folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from backfire.commands.run import start
from backfire.recipe import Recipe, parse
from backfire.store import read_json

SETTINGS = {
    "data": {"name": "sandbox-reviews", "rows": 60, "test_rows": 24},
    "template": "sentiment-line",
    "attack": "badnets",
    "train": {"max_steps": 4, "batch_size": 8},
    "metrics": ["accuracy", "auc", "attack-success", "false-trigger", "perplexity"],
}


@dataclass(frozen=True)
class Place:
    """A cache and an output folder of their own."""

    root: Path
    tiny: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def recipe(self, **knobs: Any) -> Recipe:
        settings = {"model": str(self.tiny), **SETTINGS, **knobs}
        return parse("small", "# Does it?\n" + yaml.safe_dump(settings))

    def run(self, machine: Mapping[str, Any] | None = None, **knobs: Any) -> int:
        """How many cells failed."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BACKFIRE_CACHE", str(self.cache))
            options = {"workers": 1, **(machine or {})}
            return start(self.recipe(**knobs), self.out, options, profile=None, edits=())

    def results(self) -> dict[tuple[str, float], Any]:
        found = [read_json(file) for file in self.out.glob("cells/*/result.json")]
        return {(r["method"], r["rate"]): r for r in found}

    def trained(self) -> list[str]:
        return sorted(p.name for p in self.cache.glob("train/*") if p.is_dir())

    def stamps(self) -> dict[str, int]:
        """When each file of a stage and each result was last written."""
        stages = (p for p in self.cache.rglob("*") if p.parent.name != "runs")
        files = [*stages, *self.out.glob("cells/*/*")]
        return {str(p): p.stat().st_mtime_ns for p in files if p.is_file() and p.suffix != ".lock"}


MATRIX = {"method": ["none", "full", {"name": "lora", "rank": 4}], "attack.rate": [0, 0.1]}
