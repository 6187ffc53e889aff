"""How much of a step goes through the model at once: less each time memory runs out."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from backfire.base import Rendered, TrainHook
from backfire.errors import CellError, UserError, is_out_of_memory

T = TypeVar("T")


class Room:
    """How many rows and padded tokens one pass has room for.

    Only passes of too many tokens are split: one batch of long rows does not slow down those of
    short ones. How rows are split changes sums by no more than rounding.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        """Rows in a pass, at most; None: all of a step."""
        self.tokens = math.inf
        """Rows times the longest one's tokens, at most; a single row may always have more."""
        self._passes = list[tuple[int, int]]()
        """Rows and padded tokens of each pass of this try."""

    def parts(self, rows: Sequence[Rendered], most: int | None = None) -> Iterator[list[Rendered]]:
        """All of these rows, `most` at a time: together if they fit, else in parts of like length,
        the longest first."""
        limit = min(self.rows or len(rows), most or len(rows))
        left = list(rows)
        if len(rows) > limit or _padded(left) > self.tokens:
            left = by_length(left)
        while left:
            count = min(limit, len(left))
            while count > 1 and _padded(left[:count]) > self.tokens:
                count -= 1
            part, left = left[:count], left[count:]
            self.note(part)
            yield part

    def note(self, part: Sequence[Rendered]) -> None:
        """These rows go through the model now; they are what is too much if memory runs out."""
        self._passes.append((len(part), _padded(part)))

    def fitted(self, work: Callable[[], T]) -> T:
        """What `work` returns. It is begun again, with room for less, when memory runs out.

        Raises:
            CellError: memory runs out (`oom`) with a single row.
        """
        while True:
            self._passes = []
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Not within `except`: there the traceback holds on to all that the pass had computed.
            larger = [one for one in self._passes if one[0] > 1]
            if not larger:
                raise CellError(
                    "oom",
                    "Out of memory with one row at a time; shorten train.max_length, or run with "
                    "--recompute.",
                )
            # A single row that was left over is not at fault, but the larger passes before it.
            last = self._passes[-1]
            rows, tokens = last if last in larger else max(larger, key=lambda one: one[1])
            self.tokens = tokens // rows * math.ceil(rows / 2)
            free()

    def each(
        self, rows: Sequence[Rendered], most: int, look: Callable[[list[Rendered]], None]
    ) -> None:
        """Hand all of these rows to `look`, at most `most` at a time. What it was at work on when
        memory ran out it gets again."""
        left = by_length(rows)

        def work() -> None:
            while left:
                part = next(self.parts(left, most))
                look(part)
                del left[: len(part)]

        self.fitted(work)


def by_length(rows: Sequence[Rendered]) -> list[Rendered]:
    """The longest first; rows of one length keep their order."""
    return sorted(rows, key=lambda row: -len(row.ids))


def _padded(rows: Sequence[Rendered]) -> int:
    return len(rows) * max(len(row.ids) for row in rows)


def tried_again(
    work: Callable[[], T], sentence: str, between: Callable[[], None] = lambda: None
) -> T:
    """What `work` returns, for work that cannot be split: once more after memory was freed.

    Raises:
        CellError: memory runs out (`oom`) again; it says `sentence`.
    """
    for _ in range(2):
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        between()
        free()
    raise CellError("oom", sentence)


def free() -> None:
    """Give back the memory of what nobody holds any more: some objects hold each other."""
    gc.collect()
    torch.cuda.empty_cache()  # which does nothing where no GPU is used


def peak_memory_mb() -> float:
    """The most this process has held: GPU memory if it used a GPU, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, StopIteration):  # ru_maxrss would count the parent's peak too
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def recompute_layers(model: PreTrainedModel) -> None:
    """From now on a layer keeps no more than its input while it is trained, and is run a second
    time for its backward pass.

    Raises:
        UserError: this model has no such layers.
    """
    new = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.20 or so
    try:
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"--recompute: models of type '{model.config.model_type}' cannot run their layers "
            "again; leave it out."
        ) from None


def refuse_hooks(model: PreTrainedModel, guards: Sequence[TrainHook]) -> None:
    """
    Raises:
        UserError: a defense has hooks on modules that are about to be run again, and would take
            that for another pass.
    """
    unaware = {type(guard).__module__: guard for guard in guards if not guard.knows_recomputing}
    for module in model.modules() if unaware else ():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            while isinstance(hook, partial):
                hook = hook.func
            if guard := unaware.get(hook.__module__):
                raise UserError(
                    f"--recompute: the defense of {type(guard).__name__} looks into layers that "
                    "would be run twice, without knowing it; leave --recompute out."
                )
