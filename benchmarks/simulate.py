"""`python -m benchmarks.simulate`: thousands of cells on many nodes, some of which are lost.

A node is a thread, of a process with as many of them as are lost together (see
`benchmarks.simulated_node`). Heartbeats, the age of a stale claim and the work itself are
shortened, so that all of them meet as often as in hours of real time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RECIPE = """# How far does it go?
model: sandbox
data: {name: sandbox-reviews, rows: 40, test_rows: 8}
template: sentiment-line
attack: badnets
method: {name: lora, rank: 4}
metrics: [accuracy]
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    add = parser.add_argument
    add("--cells", type=int, default=10_000)
    add("--nodes", type=int, default=100)
    add("--lost", type=int, default=10, help="nodes that are killed at once, in the middle")
    add("--together", type=int, default=10, help="nodes of one process")
    add("--train-seconds", type=float, default=8.0, help="a training run, shortened")
    add("--cell-seconds", type=float, default=4.0, help="an evaluation, shortened")
    add("--speed", type=float, default=10.0, help="by how much heartbeats are shortened")
    add("--name", default="simulation", help="the result is written to <date>-<name>.json")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run it, print the figures and write them as JSON; returns the path."""
    from backfire.store import write_json

    options = arguments(argv)
    with tempfile.TemporaryDirectory(prefix="simulation-") as folder:
        os.environ["BACKFIRE_CACHE"] = str(Path(folder) / "cache")
        figures = simulate(options, Path(folder))
    when = datetime.now(UTC).isoformat(timespec="seconds")
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "name")}
    path: Path = options.out / f"{when[:10]}-{options.name}.json"
    write_json(path, {"when": when, "cores": os.cpu_count(), **settings, "figures": figures})
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"Written: {path}")
    return path


def simulate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Plan, start the nodes, kill some, wait for the others; returns the figures."""
    from backfire.launch import imports
    from backfire.launch.folder import read_plan
    from benchmarks.simulated_node import Pace, run_nodes

    run, cache = folder / "run", folder / "cache"
    figures = plan(options.cells, run)
    begun_cpu = time.process_time()
    found = read_plan(run)  # once for all nodes: they share two cores here
    figures["cpu_seconds_to_read_the_plan"] = round(time.process_time() - begun_cpu, 1)
    imports.keep()  # once, and not by every node, which would copy all of its memory
    pace = Pace(options.train_seconds, options.cell_seconds, options.speed)
    context = multiprocessing.get_context("fork")
    begun = time.time()
    split, every = options.together, range(options.nodes)
    parts = [every[: options.lost], *(every[i : i + split] for i in every[options.lost :: split])]
    processes = [
        context.Process(target=run_nodes, args=(part, run, cache, pace, found))
        for part in parts
        if part
    ]
    for process in processes:
        process.start()
    killed_at = _kill_in_the_middle(processes, options.lost, run, options.cells)
    figures |= {f"{k}_while_running": v for k, v in status(run, cache).items()}
    for process in processes:
        process.join()
    lines = [*events(folder / "log")]
    figures |= results(lines, run, options, begun, killed_at) | files(run, cache)
    return figures | {f"{k}_at_the_end": v for k, v in status(run, cache).items()}


def plan(count: int, run: Path) -> dict[str, Any]:
    """Write the plan as `backfire plan` does; returns how long its parts took, and its size."""
    from backfire import plan as graph
    from backfire.launch.folder import JOBS, write_plan
    from backfire.launch.resolve import resolve_auto, types_of
    from backfire.recipe import parse

    rates = [round(0.05 + 0.01 * n, 2) for n in range(10)]
    axes = f"matrix: {{seed: {list(range(-(-count // 10)))}, attack.rate: {rates}}}\n"
    begun = time.monotonic()
    recipe = resolve_auto(parse("simulation", RECIPE + axes), types_of("cpu"))
    read = time.monotonic()
    jobs = graph.jobs(recipe.cells, recipe.axes)
    made = time.monotonic()
    write_plan(run, recipe, jobs, device="cpu")
    return {
        "cells": len(recipe.cells),
        "jobs": len(jobs),
        "plan_recipe_seconds": round(read - begun, 1),
        "plan_jobs_seconds": round(made - read, 1),
        "plan_write_seconds": round(time.monotonic() - made, 1),
        "plan_megabytes": round((run / JOBS).stat().st_size / 1e6, 1),
    }


def _kill_in_the_middle(processes: list[Any], lost: int, run: Path, cells: int) -> float:
    """Kill the process of the first nodes once half of the cells are done; returns when."""
    while sum(1 for _ in run.glob("cells/*/result.json")) < cells / 2:
        if not any(process.is_alive() for process in processes):
            raise RuntimeError("the nodes ended before half of the cells were done")
        time.sleep(2)
    if lost:
        processes[0].kill()
    return time.time()


def status(run: Path, cache: Path) -> dict[str, float]:
    """Seconds that `backfire status` takes in a process of its own, and its processor time."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "backfire.cli", "status", str(run)]
    environment = {**os.environ, "BACKFIRE_CACHE": str(cache)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = {"status_seconds": time.monotonic() - begun, "status_cpu_seconds": used}
    return {name: round(value, 2) for name, value in seconds.items()}


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """What the nodes wrote down, with the number of the node."""
    for file in folder.glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield {**json.loads(line), "node": int(file.stem)}


def results(
    lines: list[dict[str, Any]], run: Path, options: argparse.Namespace, begun: float, killed: float
) -> dict[str, Any]:
    """What came out: lost and repeated work, overhead, recovery."""
    lost = set(range(options.lost))
    ends = Counter(line["job"] for line in lines if line["what"] == "end")
    again = [*_begun_again(lines, _open_jobs(lines, lost), lost, killed)]
    done = sum(1 for _ in run.glob("cells/*/result.json"))
    work_seconds = options.train_seconds + options.cell_seconds
    last = max(line["at"] for line in lines if line["what"] == "end")
    gaps = [gap for node in range(options.nodes) for gap in _gaps(lines, node)]
    cpu = sum(
        max(line["cpu"] for line in lines if line["node"] == node) for node in range(options.nodes)
    )
    return {
        "cells_done": done,
        "jobs_ended_twice": sum(count > 1 for count in ends.values()),
        "jobs_of_lost_nodes": len(again),
        "recovery_seconds_first_and_last": [round(f(again), 1) for f in (min, max)]
        if again
        else [],
        "stale_after_seconds": round(300 / options.speed, 1),
        "makespan_seconds": round(last - begun, 1),
        "work_seconds_per_node": round(_slept(lines, options) / options.nodes, 1),
        "cpu_seconds_per_job": round(cpu / len(ends), 4),
        "seconds_between_jobs_median": round(statistics.median(gaps), 3),
        "seconds_between_jobs_95th": round(sorted(gaps)[int(0.95 * len(gaps))], 3),
        "cell_work_seconds": work_seconds,
    }


def _open_jobs(lines: list[dict[str, Any]], lost: set[int]) -> list[str]:
    """The jobs that the lost nodes had begun and not ended."""
    found = []
    for node in lost:
        mine = [line for line in lines if line["node"] == node and line["what"] in ("begin", "end")]
        found += [mine[-1]["job"]] if mine and mine[-1]["what"] == "begin" else []
    return found


def _begun_again(
    lines: list[dict[str, Any]], jobs: list[str], lost: set[int], killed: float
) -> Iterator[float]:
    """After how many seconds other nodes began the jobs of the lost ones. One that had just ended,
    although its node was killed before it wrote that down, is not begun again."""
    begun: dict[str, list[float]] = {job: [] for job in jobs}
    for line in lines:
        others = line["what"] == "begin" and line["node"] not in lost and line["at"] > killed
        if others and line["job"] in begun:
            begun[line["job"]].append(line["at"] - killed)
    yield from (min(times) for times in begun.values() if times)


def _gaps(lines: list[dict[str, Any]], node: int) -> Iterator[float]:
    """Seconds between the end of a job and the begin of the next one."""
    before = None
    for line in lines:
        if line["node"] == node and line["what"] in ("begin", "end"):
            if line["what"] == "begin" and before is not None:
                yield line["at"] - before
            before = line["at"] if line["what"] == "end" else None


def _slept(lines: list[dict[str, Any]], options: argparse.Namespace) -> float:
    counts = Counter(line["what"] for line in lines)
    return counts["train"] * options.train_seconds + counts["evaluate"] * options.cell_seconds


def files(run: Path, cache: Path) -> dict[str, Any]:
    """Number and size of the files of the run folder and of the cache."""
    found: dict[str, Any] = {}
    for name, folder in (("run", run), ("cache", cache)):
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        found[f"files_in_{name}"] = len(sizes)
        found[f"megabytes_in_{name}"] = round(sum(sizes) / 1e6, 1)
    found["files_by_folder"] = dict(
        Counter(path.relative_to(run).parts[0] for path in run.rglob("*") if path.is_file())
    )
    return found


if __name__ == "__main__":
    main()
