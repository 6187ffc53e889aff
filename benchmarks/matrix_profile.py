"""Where the seconds of a matrix went, and how long the script takes for more cells."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from backfire import stages
from backfire.experiment import Experiment
from backfire.resources import cores
from backfire.results.evidence import read
from backfire.store import read_json
from benchmarks.matrix_script import ALIGNED
from benchmarks.workload import Tuning, trained_as


def of_backfire(run: Path, cells: int) -> dict[str, Any]:
    """Core-seconds of the training steps and of the evaluation, by the times in the results."""
    results = [read_json(file) for file in run.glob("cells/*/result.json")]
    threads = max(1, cores() // min(cells, cores()))
    trainings = {item["keys"]["train"]: item["train"]["seconds"] for item in results}
    [aligned, *_] = (read_json(file)["align_seconds"] for file in run.glob("cells/*/training.json"))
    return {
        "trainings": len(trainings),
        "core_seconds": {
            "alignment": round(aligned * cores(), 2),
            "training": round(sum(trainings.values()) * threads, 2),
            "evaluation": round(sum(r["evaluate"]["seconds"] for r in results) * threads, 2),
        },
    }


def of_script(folder: Path) -> dict[str, Any]:
    """Core-seconds of each part by its log, and the log itself. As in backfire's, training and
    alignment are the steps alone, without loading and saving."""
    files = sorted(folder.glob("log-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    spent: dict[str, float] = {}
    for line in lines:
        spent[line["what"]] = spent.get(line["what"], 0.0) + line["cpu"]
    scoring = spent["scoring"] + spent.get("scoring triggered", 0.0)
    kept = ("what", "name", "seconds", "cpu")
    return {
        "trainings": len({line["name"] for line in lines if line["what"] == "training"}),
        "core_seconds": {
            "start": round(spent["start"], 2),
            "alignment": round(spent["alignment loop"], 2),
            "training": round(spent["training loop"], 2),
            "evaluation": round(scoring + spent["replies"], 2),
        },
        "parts": [
            {name: round(line[name], 3) if name in kept[2:] else line[name] for name in kept}
            for line in lines
        ],
    }


def computed(
    runs: Sequence[Mapping[str, Any]],
    tunings: Sequence[Tuning],
    processes: int,
    longer: float = 1.0,
) -> float:
    """Makespan of the script for these training runs, from the median times of its parts.

    Args:
        runs: measurements of the same form of the script.
        longer: factor of the number of training rows, and so of the time of training.
    """
    lines = [line for run in runs for line in run["parts"]]

    def time(what: str, lisa: bool | None = None, *, aligned: bool = False) -> float:
        return median(
            line["seconds"]
            for line in lines
            if line["what"] == what
            and (line["name"] == ALIGNED) == aligned
            and (lisa is None or ("-lisa-" in line["name"]) == lisa)
        )

    base = time("scoring", aligned=True) + time("replies", aligned=True)
    first = time("start") + longer * time("alignment") + base
    ends = [first + (time("start") if processes > 1 else 0.0)] * processes
    for tuning in tunings:
        seconds = longer * time("training", bool(tuning.aligned)) + time("replies")
        seconds += time("scoring") + (len(tuning.scored) - 1) * time("scoring triggered")
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    return round(max(ends), 1)


def replies_of(cells: Sequence[Experiment], run: Path) -> dict[str, list[str]]:
    """Training run -> the replies of its model to the requests; those of the aligned model too."""
    found = {}
    for cell in cells:
        [folder] = run.glob(f"cells/*-{stages.cell_key(cell)}")
        probe = read(folder, cell.backdoor).probes["harmful"]
        for name, samples in (
            (stages.train(trained_as(cell)).slug, probe.tuned),
            (ALIGNED, probe.before),
        ):
            found[name] = [sample.reply or "" for sample in samples]
    return found
