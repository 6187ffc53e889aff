"""The file system of a run, or its cache, goes away or cannot be written."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from backfire.errors import CellError, UserError
from tests.helpers.patience import until
from tests.torture import mounts
from tests.torture.cell import Say
from tests.torture.child import Child
from tests.torture.cluster import FILES, FOUR, compared, complete_cells, recipe, supervised, whole
from tests.torture.command import command_line
from tests.torture.nodes import Host, plan, work_as
from tests.torture.row import Figures, Ground, NotHere, row


@row(
    "While two workers share four cells, one of them idle at first, the file system of their run "
    "and cache does not answer for a minute (2 s in the tests), or, every other time, all of it is "
    "missing. Then a worker is started again, for what the two have left if they have ended.",
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
        gap = (rng.uniform(0, 0.5) * (number > 0), seconds, empty)
        ended = Child(_with_a_gap, root, gap).result()
        if "lacks" in ended:
            raise NotHere(ended["lacks"])
        found["times_gone"] += ended["gone"]
        found["times_gone_while_one_was_idle"] += ended["idle"]
        found["tracebacks"] += bool(ended["traceback"])
        found["lost_cells"] += ended["lost"]
        how = "ended_when_it_was_missing" if empty else "ended_when_it_did_not_answer"
        found[how] += bool(ended["error"]) or set(ended["jobs"].values()) != {"ok"}
        found[how] += ended["other"] != 0
        print(ended["traceback"], end="")
        again = Child(work_as, root, Host("again")).result()
        found["unfinished"] += set(again.values()) != {"ok"}
        compared(found, expected, root)
        shutil.rmtree(root)
    names = ("times_gone", "times_gone_while_one_was_idle")
    names += ("ended_when_it_did_not_answer", "ended_when_it_was_missing")
    names += ("unfinished", "lost_cells", "tracebacks", *FILES)
    return {name: found[name] for name in names}


def _with_a_gap(say: Say, root: Path, gap: tuple[float, float, Path | None]) -> dict[str, Any]:
    """Work beside another worker, with a file system that is gone in between: how many seconds
    after the other one looked for a job, for how many, and which folder is in its place."""
    after, seconds, empty = gap
    found: dict[str, Any] = {"gone": 0, "idle": 0, "lost": 0, "other": 0}
    found |= {"error": "", "traceback": "", "jobs": {}}
    try:
        mounts.alone()
        mounts.dead(root / "tried")
        mounts.unmount(root / "tried")
    except NotHere as lacking:
        return {"lacks": str(lacking)}
    context, over = multiprocessing.get_context("fork"), threading.Event()
    looked = context.Event()
    other = context.Process(target=_beside, args=(root, looked))
    other.start()

    def go_away() -> None:
        while not looked.wait(0.01) and not over.is_set():
            pass
        if over.wait(after):
            return
        before = complete_cells(root)
        found["idle"] = len(_claimed(root)) < 2
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
    other.join()
    found["other"] = other.exitcode
    return found


def _beside(root: Path, looked: Any) -> None:
    """Work as another host from the first job on, for which this one has to wait."""
    until(lambda: _claimed(root))
    try:
        ended = work_as(lambda word: looked.set(), root, Host("beside"))
    except (OSError, UserError, CellError):
        sys.exit(1)
    sys.exit(set(ended.values()) != {"ok"})


def _claimed(root: Path) -> list[Path]:
    return [*root.glob("out/claims/[!.]*")]


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
