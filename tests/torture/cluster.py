"""Several workers and supervisors on one run folder: killed, lost, stopped, with wrong clocks."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from backfire.store import SEAL
from tests.helpers.patience import until
from tests.helpers.small_run import Place
from tests.torture.cell import SETTINGS, Say, outputs, stages_in
from tests.torture.child import Child
from tests.torture.command import command_line
from tests.torture.nodes import STALE, Host, count_makes, plan, repeats, work_as
from tests.torture.row import Figures, Ground, row

SMALL = {**SETTINGS, "train": {"max_steps": 3, "batch_size": 8}}
LORA = {"name": "lora", "rank": 4}
FOUR = {"method": ["full", LORA], "attack.rate": [0, 0.2]}
MATRIX = {"method": ["full", LORA], "attack.rate": [0, 0.1, 0.2], "seed": [0, 1, 2, 3]}
CELLS = 24
KILLS = ("kills_of_everything", "kills_of_the_supervisor", "kills_of_one_worker")
FILES = ("missing_files", "differing_files")


def recipe(root: Path, tiny: Path, matrix: dict[str, Any]) -> Any:
    """The recipe, also as `root / "small.yaml"`."""
    made = Place(root, tiny).recipe(**SMALL, matrix=matrix)
    root.mkdir(exist_ok=True)
    (root / "small.yaml").write_text(made.text)
    return made


def supervised(say: Say, root: Path, workers: int) -> dict[str, Any]:
    """`backfire run`; its worker processes are forked from this one, which has imported torch."""
    import multiprocessing

    get = multiprocessing.get_context
    multiprocessing.get_context = lambda how=None: get("fork" if how == "forkserver" else how)
    count_makes(root)
    say("begun")
    return command_line(root, ["run", "small.yaml", "--out", "out", "--workers", str(workers)])


def whole(ground: Ground, matrix: dict[str, Any]) -> dict[str, str]:
    """What an uninterrupted run of one process gives; run once for all rows."""
    key = str((ground.tiny, matrix))
    if key not in _WHOLE:
        root = ground.root / "whole"
        recipe(root, ground.tiny, matrix)
        ended = Child(supervised, root, 1).result()
        assert ended["code"] == 0, ended
        _WHOLE[key] = outputs(root)
    return _WHOLE[key]


_WHOLE: dict[str, dict[str, str]] = {}


def compared(found: Counter[str], expected: dict[str, str], root: Path) -> None:
    got = outputs(root)
    found["missing_files"] += len(expected.keys() - got.keys())
    found["differing_files"] += sum(got[name] != expected.get(name) for name in got)


# ------------------------------------------------------------------------------ everything killed


@row(
    "`backfire run` of 24 cells with two workers is started again and again, and at random times "
    "SIGKILL ends the supervisor with its workers, the supervisor alone, or one worker; results "
    "and stages that were complete must stay untouched, and numbers must be those of an "
    "uninterrupted run. Stages that a kill interrupted are begun again.",
    full=100,
    small=10,
    zero=(
        *("lost_cells", "repeated_cells", "lost_stages", "repeated_stages", "failed_runs"),
        *("missing_files", "differing_files"),
    ),
    some=("kills", *KILLS, "jobs_interrupted", "matrices", "stages"),
)
def matrix_kills(count: int, ground: Ground) -> Figures:
    rng, found, begun = Random(0), Counter[str](), time.monotonic()
    expected = whole(ground, MATRIX)
    longest = (time.monotonic() - begun) / 4
    root = ground.root / "killed"
    while found["kills"] < count:
        recipe(root, ground.tiny, MATRIX)
        complete: dict[Path, int] = {}
        while found["kills"] < count:
            child = Child(supervised, root, 2)
            child.said()
            if not child.wait(rng.uniform(0, longest)):
                break
            found += _some_killed(child, rng, found["kills"] % 3)
            found["jobs_interrupted"] += len([*root.glob("out/claims/[a-z]*")])
            _still_there(found, complete, root)
        while (ended := _ends(child)) is None or ended["code"] != 0:
            found["failed_runs"] += ended is not None
            child = Child(supervised, root, 2)
        _still_there(found, complete, root)
        found["matrices"] += 1
        found["lost_cells"] += CELLS - len(complete_cells(root))
        found["stages"] += len(complete) - CELLS
        found["stages_begun_again"] += repeats(root / "begun")
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("kills", *KILLS, "jobs_interrupted", "matrices", "stages", "stages_begun_again")
    names += ("lost_cells", "repeated_cells", "lost_stages", "repeated_stages")
    return {name: found[name] for name in (*names, "failed_runs", *FILES)}


def _some_killed(child: Child, rng: Random, choice: int) -> Counter[str]:
    """Kill everything, the supervisor alone, or one worker, which the supervisor replaces."""
    workers = [pid for pid in _members(child.pid) if pid != child.pid]
    if choice == 2 and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
        child.wait(rng.uniform(0, 1))
        child.kill()
        return Counter({"kills": 2, "kills_of_one_worker": 1, "kills_of_everything": 1})
    if choice == 1:
        child.process.kill()
        child.process.join()
        return Counter({"kills": 1, "kills_of_the_supervisor": 1})
    child.kill()
    return Counter({"kills": 1, "kills_of_everything": 1})


def _members(group: int) -> list[int]:
    """The processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def complete_cells(root: Path) -> list[Path]:
    return sorted(root.glob("out/cells/*/result.json"))


def _still_there(found: Counter[str], complete: dict[Path, int], root: Path) -> None:
    """Count results and stages that were complete and are gone, or were written again."""
    for file, stamp in complete.items():
        what = "stages" if file.name == SEAL else "cells"
        if not file.exists():
            print(f"lost: {file.relative_to(root)}", flush=True)
            found[f"lost_{what}"] += 1
        elif file.stat().st_mtime_ns != stamp:
            found[f"repeated_{what}"] += 1
    ends = [*complete_cells(root), *(folder / SEAL for folder in stages_in(root))]
    complete |= {file: file.stat().st_mtime_ns for file in ends}


def _ends(child: Child) -> Any:
    """How a command ended; None if it was killed."""
    try:
        ended = child.result()
    finally:
        child.kill()
    return ended if isinstance(ended, dict) else None


# ------------------------------------------------------------------------------- at the same time


@row(
    "Two `backfire run`, or one and a worker that is started by hand, begin the same four cells in "
    "the same folder at the same time.",
    full=20,
    small=2,
    zero=("repeated", "failed_runs", "missing_files", "differing_files"),
    some=("cells",),
)
def two_schedulers(count: int, ground: Ground) -> Figures:
    found, expected = Counter[str](), whole(ground, FOUR)
    for number in range(count):
        root = ground.root / "two"
        recipe(root, ground.tiny, FOUR)
        first = Child(supervised, root, 1 + number // 2 % 2)
        if number % 2:
            until(lambda root=root: (root / "out/jobs.json").exists())
            second = Child(work_as, root, Host("second", short_beats=False))
        else:
            second = Child(supervised, root, 1)
        ends = [first.result(), second.result()]
        found["failed_runs"] += sum(bool(one.get("code")) for one in ends)
        found["cells"] += len(complete_cells(root))
        found["repeated"] += repeats(root / "made")
        compared(found, expected, root)
        shutil.rmtree(root)
    return {name: found[name] for name in ("cells", "repeated", "failed_runs", *FILES)}


@row(
    "Two workers whose clocks are an hour behind and an hour ahead share four cells.",
    full=10,
    small=1,
    zero=("repeated", "missing_files", "differing_files"),
    some=("cells", "done_by_the_first", "done_by_the_second"),
)
def clocks_apart(count: int, ground: Ground) -> Figures:
    found, expected = Counter[str](), whole(ground, FOUR)
    for _ in range(count):
        root = ground.root / "clocks"
        plan(root, recipe(root, ground.tiny, FOUR))
        hosts = [Host("behind", -3600), Host("ahead", 3600)]
        workers = [Child(work_as, root, host) for host in hosts]
        for worker in workers:
            worker.result()
        found["cells"] += len(complete_cells(root))
        found["repeated"] += repeats(root / "made")
        pids = [line.split()[1] for line in (root / "made").read_text().splitlines()]
        found["done_by_the_first"] += pids.count(str(workers[0].pid))
        found["done_by_the_second"] += pids.count(str(workers[1].pid))
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("cells", "done_by_the_first", "done_by_the_second", "repeated")
    return {name: found[name] for name in (*names, *FILES)}


# ------------------------------------------------------------------------------------- lost nodes


@row(
    "Of two workers on different hosts, the one that is evaluating a cell is killed or stopped "
    f"for longer than its claim is valid ({STALE} s instead of 5 minutes); the other one must "
    "finish.",
    full=20,
    small=2,
    zero=("unfinished", "missing_files", "differing_files", "claims_left"),
    some=("killed", "stopped", "taken_over"),
)
def lost_node(count: int, ground: Ground) -> Figures:
    rng, found, expected = Random(0), Counter[str](), whole(ground, FOUR)
    for number in range(count):
        root = ground.root / "lost"
        plan(root, recipe(root, ground.tiny, FOUR))
        workers = [Child(work_as, root, Host(name)) for name in ("first", "second")]
        lost, other = workers
        job = _evaluates(lost)
        time.sleep(rng.uniform(0, 0.05))
        how = (signal.SIGKILL, signal.SIGSTOP)[number % 2]
        os.kill(lost.pid, how)
        found["stopped" if number % 2 else "killed"] += 1
        if how is signal.SIGSTOP:
            time.sleep(2 * STALE)
            os.kill(lost.pid, signal.SIGCONT)
            lost.result()
        ended = other.result()
        lost.kill()
        found["taken_over"] += bool(job) and ended.get(job) == "ok"
        found["unfinished"] += set(ended.values()) != {"ok"}
        found["claims_left"] += len([*root.glob("out/claims/[a-z]*")])
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("killed", "stopped", "taken_over", "unfinished", "claims_left", "missing_files")
    return {name: found[name] for name in (*names, "differing_files")}


def _evaluates(worker: Child) -> str | None:
    """The first cell that a worker evaluates; its training is a job of its own."""
    while (word := worker.said()) is not None:
        if isinstance(word, tuple) and word[0].startswith("cell-"):
            return str(word[0])
    return None
