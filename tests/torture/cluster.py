"""Several workers and supervisors on one run folder: killed, lost, stopped, and with wrong clocks
or a file system that goes away."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from backfire.errors import CellError, UserError
from tests.helpers.small_run import Place
from tests.torture import mounts
from tests.torture.cell import SETTINGS, Say, outputs
from tests.torture.child import Child, until
from tests.torture.command import command_line
from tests.torture.nodes import STALE, Host, count_makes, plan, repeats, work_as
from tests.torture.row import Figures, Ground, NotHere, row

SMALL = {**SETTINGS, "train": {"max_steps": 3, "batch_size": 8}}
LORA = {"name": "lora", "rank": 4}
FOUR = {"method": ["full", LORA], "attack.rate": [0, 0.2]}
MATRIX = {"method": ["full", LORA], "attack.rate": [0, 0.1, 0.2], "seed": [0, 1, 2, 3]}
CELLS = 24


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
    count_makes(root / "made")
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
    "uninterrupted run.",
    full=100,
    small=10,
    zero=("lost_cells", "repeated_cells", "failed_runs", "missing_files", "differing_files"),
    some=("kills", "kills_of_one_worker", "matrices"),
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
            _still_there(found, complete, root)
        while (ended := _ends(child)) is None or ended["code"] != 0:
            found["failed_runs"] += ended is not None
            child = Child(supervised, root, 2)
        _still_there(found, complete, root)
        found["matrices"] += 1
        found["lost_cells"] += CELLS - len(complete_cells(root))
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("kills", "kills_of_one_worker", "matrices", "lost_cells", "repeated_cells")
    names += ("failed_runs", "missing_files", "differing_files")
    return {name: found[name] for name in names}


def _some_killed(child: Child, rng: Random, choice: int) -> Counter[str]:
    """Kill everything, the supervisor alone, or one worker, which the supervisor replaces."""
    workers = [pid for pid in _members(child.pid) if pid != child.pid]
    if choice == 2 and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
        child.wait(rng.uniform(0, 1))
        child.kill()
        return Counter(kills=2, kills_of_one_worker=1)
    if choice == 1:
        child.process.kill()
        child.process.join()
        return Counter(kills=1)
    child.kill()
    return Counter(kills=1)


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
    """Count results that were complete and are gone, or were written again."""
    for file, stamp in complete.items():
        if not file.exists():
            found["lost_cells"] += 1
        elif file.stat().st_mtime_ns != stamp:
            found["repeated_cells"] += 1
    complete |= {file: file.stat().st_mtime_ns for file in complete_cells(root)}


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
            second = Child(work_as, root, Host("second"))
        else:
            second = Child(supervised, root, 1)
        ends = [first.result(), second.result()]
        found["failed_runs"] += sum(bool(one.get("code")) for one in ends)
        found["cells"] += len(complete_cells(root))
        found["repeated"] += repeats(root / "made")
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("cells", "repeated", "failed_runs", "missing_files", "differing_files")
    return {name: found[name] for name in names}


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
    return {name: found[name] for name in (*names, "missing_files", "differing_files")}


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


# -------------------------------------------------------------------------------- the file system


@row(
    "While a worker runs four cells, the file system of its run and cache does not answer for a "
    "minute (2 s in the tests), or, every other time, all of it is missing. Then a worker is "
    "started again, for what the first one has left if it has ended.",
    full=4,
    small=1,
    zero=(
        *("ended_when_it_did_not_answer", "unfinished", "lost_cells", "tracebacks"),
        *("missing_files", "differing_files"),
    ),
    some=("times_gone",),
)
def file_system_gone(count: int, ground: Ground) -> Figures:
    rng, found, expected = Random(0), Counter[str](), whole(ground, FOUR)
    for number in range(count):
        root, seconds = ground.root / "gone", 60.0 if count > 1 else 2.0
        plan(root, recipe(root, ground.tiny, FOUR))
        empty = ground.root / "empty" if number % 2 else None
        gap = (rng.uniform(0.2, 1.5), seconds, empty)
        ended = Child(_with_a_gap, root, gap).result()
        if "lacks" in ended:
            raise NotHere(ended["lacks"])
        found["times_gone"] += ended["gone"]
        found["tracebacks"] += bool(ended["traceback"])
        found["lost_cells"] += ended["lost"]
        how = "ended_when_it_was_missing" if empty else "ended_when_it_did_not_answer"
        found[how] += bool(ended["error"]) or set(ended["jobs"].values()) != {"ok"}
        print(ended["traceback"], end="")
        again = Child(work_as, root, Host("again")).result()
        found["unfinished"] += set(again.values()) != {"ok"}
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("times_gone", "ended_when_it_did_not_answer", "ended_when_it_was_missing")
    names += ("unfinished", "lost_cells", "tracebacks", "missing_files", "differing_files")
    return {name: found[name] for name in names}


def _with_a_gap(say: Say, root: Path, gap: tuple[float, float, Path | None]) -> dict[str, Any]:
    """Work, with a file system that is gone in between: after how many seconds, for how many, and
    which folder is in its place."""
    after, seconds, empty = gap
    found: dict[str, Any] = {"gone": 0, "error": "", "traceback": "", "jobs": {}, "lost": 0}
    try:
        mounts.alone()
        mounts.dead(root / "tried")
        mounts.unmount(root / "tried")
    except NotHere as lacking:
        return {"lacks": str(lacking)}
    over = threading.Event()

    def go_away() -> None:
        if over.wait(after):
            return
        before = complete_cells(root)
        if empty:
            empty.mkdir(exist_ok=True)
            mounts.show(empty, root, read_only=True)
        else:
            mounts.dead(root)
        found["gone"] = 1
        time.sleep(seconds)
        mounts.unmount(root)
        found["lost"] = sum(not file.exists() for file in before)

    thread = threading.Thread(target=go_away)
    thread.start()
    try:
        found["jobs"] = work_as(say, root, Host("here"))
    except (OSError, UserError, CellError) as error:
        found["error"] = str(error)
    except Exception:
        found["traceback"] = traceback.format_exc()
    over.set()
    thread.join()
    return found


@row(
    "A run whose stages are all in a cache that cannot be written, and one that lacks some; the "
    "first must finish, and the second must say so in one sentence.",
    full=2,
    small=2,
    zero=("refused_although_complete", "without_a_sentence", "tracebacks"),
    some=("complete", "incomplete"),
)
def read_only_cache(count: int, ground: Ground) -> Figures:
    found = Counter[str]()
    root = ground.root / "run"
    recipe(root, ground.tiny, FOUR)
    assert Child(supervised, root, 1).result()["code"] == 0
    for number in range(count):
        shutil.rmtree(root / "out")
        if number % 2:
            some = sorted(path for path in root.glob("cache/train/*") if path.is_dir())
            shutil.rmtree(some[0])
            for stage in root.glob("cache/evaluate/*"):
                shutil.rmtree(stage, ignore_errors=True)
        ended = Child(_read_only, root).result()
        if "lacks" in ended:
            raise NotHere(ended["lacks"])
        found["tracebacks"] += bool(ended["traceback"]) or "Traceback" in ended["printed"]
        if number % 2:
            found["incomplete"] += 1
            found["without_a_sentence"] += "Read-only file system" not in ended["printed"]
        else:
            found["complete"] += 1
            found["refused_although_complete"] += ended["code"] != 0
    names = ("complete", "incomplete", "refused_although_complete", "without_a_sentence")
    return {name: found[name] for name in (*names, "tracebacks")}


def _read_only(say: Say, root: Path) -> dict[str, Any]:
    try:
        mounts.alone()
        mounts.show(root / "cache", root / "cache", read_only=True)
    except NotHere as lacking:
        return {"lacks": str(lacking)}
    return command_line(root, ["run", "small.yaml", "--out", "out", "--workers", "1"])
