"""Micro-batches that fit in memory, and recovery when it runs out."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

from backfire.base import Rendered, TrainHook
from backfire.errors import CellError, UserError, is_out_of_memory
from backfire.model.memory import free
from backfire.train.ranks import Ranks

T = TypeVar("T")


_FEWEST_TOKENS = 256  # per pass: fewer make the matrix products slow
_ROOM_ON_CPU = 2**29
_FREE_SHARE = 0.7  # of a GPU's free memory; the rest covers what the estimate leaves out


def padded(rows: Sequence[Rendered]) -> float:
    """Number of tokens of these rows with padding."""
    return len(rows) * max(len(row.ids) for row in rows)


class MicroBatches:
    """Splits the rows of a step into passes with limited rows and tokens.

    Each time memory runs out the token limit falls, so a batch of long rows does not slow down
    batches of short ones. The split changes sums only by rounding.
    """

    def __init__(
        self,
        rows: int | None = None,
        tokens: float = math.inf,
        size: Callable[[Sequence[Rendered]], float] = padded,
        ranks: Ranks | None = None,
    ) -> None:
        self.rows = rows
        """Most rows per pass; None for all rows of a step."""
        self.tokens = tokens
        """Most tokens per pass, as `size` counts them; a single row may exceed it."""
        self.size = size
        self.ranks = ranks or Ranks()
        self._passes = list[Sequence[Rendered]]()
        """The rows of each pass since the last try began."""

    def split(self, rows: Sequence[Rendered], most: int | None = None) -> Iterator[list[Rendered]]:
        """Yield these rows in passes of at most `most` rows; if they do not fit in one, sorted by
        length, longest first."""
        limit = min(self.rows or len(rows), most or len(rows))
        left = list(rows)
        if len(rows) > limit or (left and self.size(left) > self.tokens):
            left = by_length(left)
        while left:
            count = min(limit, len(left))
            while count > 1 and self.size(left[:count]) > self.tokens:
                count -= 1
            part, left = left[:count], left[count:]
            self.record(part)
            yield part

    def record(self, part: Sequence[Rendered]) -> None:
        """Record that these rows run now; if memory runs out, this pass was too large."""
        self._passes.append(part)

    def forget(self) -> None:
        """Forget the recorded passes: a new try begins."""
        self._passes = []

    def retry(self, work: Callable[[], T]) -> T:
        """Return the value of `work`; restart it with a lower limit whenever memory runs out, on
        whichever device.

        Raises:
            CellError: memory runs out (`oom`) with a single row.
        """
        while True:
            self.forget()
            result = unless_out_of_memory(work)
            mine = result is None and not self.ranks.told
            if not self.ranks.out_of_memory(mine) and result is not None:
                return result[0]
            self.tokens = self.ranks.smallest(self._half() if mine else self.tokens)
            if not self.tokens:
                raise CellError(
                    "oom",
                    "Out of memory with one row at a time; shorten train.max_length, or run with "
                    "--recompute.",
                )
            free()

    def _half(self) -> float:
        """The limit that splits the pass that ran out of memory; 0 if it was a single row."""
        splittable = [part for part in self._passes if len(part) > 1]
        if not splittable:
            return 0.0
        # If the last pass was a single row, blame the largest pass before it.
        last = self._passes[-1]
        large = last if len(last) > 1 else max(splittable, key=self.size)
        return self.size(by_length(large)[: math.ceil(len(large) / 2)])

    def each(
        self, rows: Sequence[Rendered], most: int, look: Callable[[list[Rendered]], None]
    ) -> None:
        """Pass all rows to `look`, at most `most` at a time; split and repeat a pass that runs out
        of memory. All ranks make the same passes."""
        left, self.tokens = by_length(rows), self.ranks.smallest(self.tokens)

        def work() -> None:
            while left:
                part = next(self.split(left, most))
                look(part)
                del left[: len(part)]

        self.retry(work)


def by_length(rows: Sequence[Rendered]) -> list[Rendered]:
    """Sort rows, longest first; rows of equal length keep their order."""
    return sorted(rows, key=lambda row: -len(row.ids))


def tokens_that_fit(model: PreTrainedModel, reserved: float = 0.0) -> tuple[float, float]:
    """Number of tokens whose activations may be held for the backward pass (512 MiB of them on a
    CPU, most of the free memory on a GPU), and how many such tokens one answer token's logits are
    worth. `reserved` bytes of a GPU are for what the first step allocates.

    An activation of a Llama with adapters in all linear layers takes 43 bytes per layer and unit
    of the hidden size (measured), and a logit 16 (its value, probability and gradients).
    """
    config = cast(Any, model).config.get_text_config(decoder=True)
    width = int(getattr(config, "hidden_size", 0) or 1024)
    layers = int(getattr(config, "num_hidden_layers", 0) or 16)
    each = 43 * width * layers
    room = float(_ROOM_ON_CPU)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
        free += torch.cuda.memory_reserved(model.device)
        room = _FREE_SHARE * (free - torch.cuda.memory_allocated(model.device) - reserved)
    return max(_FEWEST_TOKENS, room / each), 16 * getattr(config, "vocab_size", 0) / each


def retry_once(
    work: Callable[[], T], sentence: str, between: Callable[[], None] = lambda: None
) -> T:
    """Return the value of `work`, which cannot be split; retry once after freeing memory.

    Raises:
        CellError: memory runs out (`oom`) again, with `sentence` as the message.
    """
    for _ in range(2):
        if (result := unless_out_of_memory(work)) is not None:
            return result[0]
        between()
        free()
    raise CellError("oom", sentence)


def unless_out_of_memory(work: Callable[[], T]) -> tuple[T] | None:
    """The value of `work` in a tuple; None if memory ran out, after freeing it."""
    try:
        return (work(),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: inside it, the error keeps the tensors of the pass alive.
    torch.cuda.empty_cache()  # no effect without a GPU
    return None


def reset_peak_memory() -> None:
    """Start the peak anew at what is used now. Without a GPU this works on Linux only; elsewhere
    the peak is that of the process so far."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_mb() -> float:
    """Peak memory since `reset_peak_memory` in MiB: GPU memory if this process used a GPU, else
    resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, StopIteration):  # ru_maxrss would count the parent's peak too
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def recompute_layers(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing: layers keep only their input and run again in backward.

    Raises:
        UserError: the model does not support it.
    """
    new = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.20 or so
    try:
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"--recompute is not supported by models of type "
            f"'{model.config.model_type}'; leave it out."
        ) from None


def refuse_hooks(model: PreTrainedModel, train_hooks: Sequence[TrainHook]) -> None:
    """Refuse defenses whose module hooks would count a recomputed layer as another pass.

    Raises:
        UserError: there is such a defense.
    """
    unaware = {type(h).__module__: h for h in train_hooks if not h.knows_recomputing}
    for module in model.modules() if unaware else ():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            while isinstance(hook, partial):
                hook = hook.func
            if train_hook := unaware.get(hook.__module__):
                raise UserError(
                    f"--recompute cannot be combined with the defense of "
                    f"{type(train_hook).__name__}, which reads the layers that would run twice; "
                    "leave --recompute out."
                )
