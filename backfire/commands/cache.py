"""`backfire cache`: what the cache holds, what a run needs of it, and pruning."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from backfire import terminal, text
from backfire.commands.estimate import amount
from backfire.data.recipe_files import KEPT
from backfire.errors import Busy, UserError
from backfire.launch.users import FOLDER, User, users
from backfire.locks import locked
from backfire.store import SEAL, Store, last_change, stats_of
from backfire.terminal import say

_DAY = 86400.0
KINDS = {
    "tokenizer": "tokenizers",
    "base": "base models",
    "whole": "checks of weights",
    "hashes": "hashes of large input files",
    "data": "rows of data sets",
    "poison": "poisoned rows",
    "preflight": "checks of rows",
    "scanned": "findings of scanners with a model",
    "train": "trained models and adapters",
    "repair": "repaired models",
    "merge": "merged models",
    "evaluate": "answers and scores",
    "secrets": "measurements of secrets",
    "judged": "verdicts of judges",
    KEPT: "files that recipes name by @",
}


@dataclass(frozen=True)
class Entry:
    """A stage in the cache: a folder, or a file of verdicts."""

    path: Path
    kind: str
    name: str
    """Without `.partial` and `.damaged`."""
    is_done: bool
    size: int
    """In bytes."""
    used: float
    """When it was last used, to an hour, or changed, if it is not done; in seconds since 1970."""
    lock: Path
    """The lock of whoever builds it."""


def entries(store: Store) -> Iterator[Entry]:
    """Everything in the cache, and what is being built on the scratch disk."""
    for root in dict.fromkeys((store.root, store.scratch)):
        for path in sorted(root.glob("*/*")):
            kind = path.parent.name
            if kind == FOLDER or path.suffix in (".lock", ".claim") or path.name.startswith("."):
                continue
            is_done = path.suffix not in (".partial", ".damaged")
            seal = path / SEAL
            used = last_change(seal if is_done and seal.exists() else path)
            name = path.name if is_done or not path.is_dir() else path.stem
            lock = store.root / kind / f"{name}.lock"
            yield Entry(path, kind, name, is_done, _size(path), used, lock)


def _size(path: Path) -> int:
    """Bytes of a stage; files of one that is being built may be gone by now."""
    return sum(one.st_size for one in stats_of(path) if S_ISREG(one.st_mode))


# -------------------------------------------------------------------------------------- looking


def show(run: Path | None) -> None:
    """Print the size of each kind of stage, and the runs that use the cache; of one run, what it
    needs.

    Raises:
        UserError: the run does not use this cache.
    """
    store = Store()
    found = list(entries(store))
    if run:
        user = _named(run, users(store.root))
        found = [one for one in found if user.needs_stage(one.kind, one.name)]
    say(f"{'Needed of the cache' if run else 'Cache'} {store.root}: {_sum(found)}")
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in found)]
    others = sorted({one.kind for one in found} - {*KINDS})
    rows = [_row(kind, [one for one in found if one.kind == kind]) for kind in (*kinds, *others)]
    if rows:
        terminal.put(("kind", "what", "stages", "unfinished", "size"), rows, right=(2, 3, 4))
    if not run:
        for user in users(store.root):
            done, total = user.cells()
            state = f"{done} of {text.count(total, 'cell')} done"
            say(f"{user.run}: {state if user.is_here else 'gone' if user.is_gone else 'not there'}")


def _row(kind: str, found: Sequence[Entry]) -> tuple[str, ...]:
    done = sum(one.is_done for one in found)
    size = sum(one.size for one in found)
    return kind, KINDS.get(kind, ""), f"{done:,}", f"{len(found) - done:,}", amount(size)


def _sum(found: Sequence[Entry]) -> str:
    return f"{text.count(len(found), 'stage')}, {amount(sum(one.size for one in found))}"


def _named(run: Path, known: Sequence[User]) -> User:
    alike = sorted((u for u in known if u.run == run.resolve()), key=lambda user: not user.is_here)
    if not alike:
        raise UserError(f"{run} is not a run that uses this cache; `backfire cache` lists them.")
    return alike[0]


# -------------------------------------------------------------------------------------- pruning


def prune(older: float, keep: Sequence[Path], *, remove: bool) -> None:
    """Print what can go, and remove it if `remove` says so: what no unfinished run needs, was not
    used for `older` days, and is not being built.

    Raises:
        UserError: a run to keep does not use this cache.
    """
    store = Store()
    known = users(store.root)
    kept = [_named(run, known) for run in keep]
    for user in known:
        done, total = user.cells()
        if not user.is_gone and done < total:
            kept.append(user)
            left = f"{total - done} of {text.count(total, 'cell')} left"
            say(f"Kept for {user.run}: {left if user.is_here else _not_there(user)}.")
    gone = [one for one in entries(store) if _can_go(one, older, kept)]
    say(f"{'Removing' if remove else 'Would free'}: {_sum(gone)}.")
    for kind in dict.fromkeys(one.kind for one in gone):
        alike = [one for one in gone if one.kind == kind]
        say(f"  {kind} ({KINDS.get(kind, 'unknown')}): {_sum(alike)}")
    if not remove:
        say("Nothing was removed; add --yes to remove it." if gone else "Nothing to remove.")
        return
    freed = [one for one in gone if _remove(one)]
    for user in known:
        if user.is_gone:
            user.file.unlink(missing_ok=True)
    say(f"Freed {amount(sum(one.size for one in freed))}.")


def _not_there(user: User) -> str:
    seen = f"it was unfinished when {user.host} last worked on it, and is not there now"
    return f"{seen}; if it was removed and not moved, remove {user.file} too"


def _can_go(one: Entry, older: float, kept: Sequence[User]) -> bool:
    """Whether a stage may be removed. An unfinished one counts as being built for a day after its
    last change: the lock of another host may not be visible here."""
    age = time.time() - one.used
    if age < older * _DAY or (not one.is_done and age < _DAY):
        return False
    return one.path.suffix == ".damaged" or not any(
        user.needs_stage(one.kind, one.name) for user in kept
    )


def _remove(one: Entry) -> bool:
    """Remove a stage as the holder of its lock; returns whether it could."""
    try:
        with locked(one.lock.with_suffix(""), waits=False, across_hosts=True):
            if not one.path.is_dir():
                one.path.unlink(missing_ok=True)
            elif one.is_done:  # whoever looks sees all of it or nothing
                moved = one.path.with_name(f"{one.name}.damaged")
                shutil.rmtree(moved, ignore_errors=True)
                one.path.replace(moved)
                shutil.rmtree(moved)
            else:
                shutil.rmtree(one.path)
            one.lock.unlink(missing_ok=True)  # those who wait for it notice
    except Busy:
        return False
    return True
