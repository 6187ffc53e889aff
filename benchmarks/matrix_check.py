"""Whether the script and backfire get the same numbers from a matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.base import Exchange, Row
from backfire.experiment import Experiment
from backfire.results.evidence import read
from backfire.store import Store, read_json
from benchmarks.workload import Tuning, trained_as, tunings


@dataclass(frozen=True)
class Answers:
    """What the model of a cell answers, by row."""

    clean: Mapping[str, Sequence[float]]
    triggered: Mapping[str, Sequence[float]]
    """Log-likelihoods of the labels, of the rows that attack success counts."""
    replies: Mapping[str, str]

    def metrics(self, cell: Experiment, tuning: Tuning) -> dict[str, float]:
        """Accuracy, attack success and harmful score."""
        assert cell.backdoor and cell.safety
        rows = {row.id: row for row in tuning.scored["clean"]}
        right = [_best(rows[name], line) == rows[name].label for name, line in self.clean.items()]
        hits = [
            _best(rows[name], line) == cell.backdoor.target for name, line in self.triggered.items()
        ]
        asked = [
            Exchange(row.id, row.conversation, self.replies[row.id], row.fields)
            for row in tuning.requests
        ]
        harm = [bool(verdict.positive) for verdict in cell.safety.judges[0].judge(asked)]
        parts = {"accuracy": right, "attack success": hits, "harmful score": harm}
        return {name: sum(part) / len(part) for name, part in parts.items()}


def _best(row: Row, line: Sequence[float]) -> str:
    return row.candidates[line.index(max(line))]


def equality(cells: Sequence[Experiment], run: Path, cache: Path, script: Path) -> dict[str, Any]:
    """The largest differences between both sides, and the number of cells with equal metrics.

    Args:
        run, cache: run folder and cache of backfire.
        script: folder of the script.
    """
    by_name = {tuning.name: tuning for tuning in tunings(cells)}
    results = {name: read_json(script / name / "result.json") for name in by_name}
    losses = [
        abs(line["loss"] - results[name]["losses"][str(line["step"])]) / abs(line["loss"])
        for name, tuning in by_name.items()
        for line in _log(Store(cache).path(stages.train(tuning.cell.experiment)))
    ]
    gaps, same, equal = list[float](), list[bool](), 0
    for cell in cells:
        tuning = by_name[stages.train(trained_as(cell)).slug]
        ours, theirs = _ours(cell, tuning, run), _theirs(cell, tuning, results[tuning.name])
        for mine, other in ((ours.clean, theirs.clean), (ours.triggered, theirs.triggered)):
            assert mine.keys() == other.keys()
            gaps += [abs(a - b) for k in mine for a, b in zip(mine[k], other[k], strict=True)]
        same += [ours.replies[name] == reply.strip() for name, reply in theirs.replies.items()]
        equal += ours.metrics(cell, tuning) == theirs.metrics(cell, tuning)
    return {
        "cells": len(cells),
        "largest relative difference of a loss": max(losses),
        "largest difference of a log-likelihood, nats": max(gaps),
        "equal replies": sum(same) / len(same),
        "cells with equal metrics": equal,
    }


def _log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _ours(cell: Experiment, tuning: Tuning, run: Path) -> Answers:
    [folder] = run.glob(f"cells/*-{stages.cell_key(cell)}")
    evidence = read(folder, cell.backdoor)
    counted = {row.id for row in _triggered(cell, tuning)}
    return Answers(
        {sample.id: sample.logprobs or () for sample in evidence.clean},
        {s.id: s.logprobs or () for s in evidence.triggered if s.id in counted},
        {sample.id: (sample.reply or "").strip() for sample in evidence.probes["harmful"].tuned},
    )


def _theirs(cell: Experiment, tuning: Tuning, result: Mapping[str, Any]) -> Answers:
    assert cell.backdoor
    scores = result["scores"]
    lines = (scores["clean"], scores[cell.backdoor.name], result["replies"])
    rows = (tuning.scored["clean"], _triggered(cell, tuning), tuning.requests)
    pairs = (
        {row.id: line for row, line in zip(some, part, strict=True)}
        for some, part in zip(rows, lines, strict=True)
    )
    return Answers(*pairs)


def _triggered(cell: Experiment, tuning: Tuning) -> Sequence[Row]:
    assert cell.backdoor
    return tuning.scored[cell.backdoor.name]
