"""A stage of two files, and how it is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backfire.store import Stage, Store

NAMES = ("a.txt", "deep/b.bin")


class Maker:
    """Makes a stage of two files and counts how often it was asked to."""

    def __init__(self, fail: int = 0) -> None:
        self.calls, self.fail, self.found = 0, fail, list[list[str]]()

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        self.found.append(sorted(p.name for p in folder.iterdir()))
        (folder / "a.txt").write_text("whole")
        if self.calls <= self.fail:
            raise RuntimeError("killed")
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep/b.bin").write_bytes(bytes(range(256)))


INSIDE = ("", "/a.txt", "/deep", "/deep/b.bin", "/done.json")
"""What is in a stage, behind its name."""


def once(root: Path, make: Callable[[Path], None], **options: bool) -> Path:
    """As another process would do it: with a store that has verified nothing yet."""
    return Store(root).once(Stage("train", "slug", "key"), make, **options)


def left(folder: Path) -> list[str]:
    """Everything below a folder but locks."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".lock")


def away(function: Callable[..., Any], code: int, times: int = 10**9) -> Callable[..., Any]:
    """A function of the system that fails so often before it works."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(args[0]))
        return function(*args, **kwargs)

    return call
