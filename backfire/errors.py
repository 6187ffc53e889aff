"""The two ways things go wrong: what the user wrote, and what happened to a cell."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator

EXIT_CLASSES = {
    "nan": "Lower method.learning_rate or raise train.warmup_share.",
    "oom": "Run with --recompute (training) or fewer --workers, shorten train.max_length, tune by "
    "method lora or qlora, or choose a smaller model.",
    "bad-data": "Correct the row the sentence names, or the setting.",
    "disk-full": "Free some space and run the same command again; what is done stays done.",
    "killed": "Run the same command again; if it is killed again, memory is the likely reason.",
    "failed": "Correct what the sentence names and run the same command again.",
}
"""How a cell that is not `ok` ended, as `error.json` names it -> what to do next."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_TEXT = re.compile(
    r"no space left on device|disk quota exceeded|\b(?:os error|errno) (?:28|122)\b"
    r"|file write failed|pytorchstreamwriter failed writing"
    r"|inline_container.*unexpected pos|\d+ requested and \d+ written",
    re.IGNORECASE,
)
"""What libraries say that write from C++ or Rust and raise no OSError: torch's archive finds itself
at an unexpected place, numpy counts what was written."""


_MEMORY_TEXTS = (
    "out of memory",  # CUDA's own error, NCCL, bitsandbytes
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # torch on a CPU, on some systems
    "alloc_failed",  # cuBLAS, cuDNN, cuSPARSE: CUBLAS_STATUS_ALLOC_FAILED
    "cudaerrormemoryallocation",
    "failed to allocate",
)


class UserError(Exception):
    """Bad input. The command line prints the sentence and exits with code 2."""


class CellError(Exception):
    """One cell cannot go on; the others can. `kind` is one of `EXIT_CLASSES`."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def is_disk_full(error: BaseException) -> bool:
    """Whether this error, or one that led to it, says that a disk or a quota is full."""
    return any(
        (isinstance(one, OSError) and one.errno in _DISK_FULL)
        # What we say ourselves may quote a user's row.
        or (not isinstance(one, UserError | CellError) and _DISK_FULL_TEXT.search(str(one)))
        for one in _chain(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, so that a smaller batch may succeed."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be loaded here
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _MEMORY_TEXTS)


def exit_class(error: BaseException) -> tuple[str, str]:
    """The exit class of whatever stopped a cell, and a sentence. `failed` is all that is left."""
    if is_disk_full(error):
        return "disk-full", "The disk is full."
    if isinstance(error, CellError):
        return error.kind, shortened(error, 2000)
    if isinstance(error, UserError):
        return "bad-data", shortened(error, 2000)
    if is_out_of_memory(error):
        own = not isinstance(error, RuntimeError) or "CPUAllocator" in str(error)
        return "oom", f"The {'machine' if own else 'GPU'} ran out of memory."
    return "failed", shortened(f"{type(error).__name__}: {error}", 2000)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was raised from or while handling."""
    todo, seen = [error], set[int]()
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [other for other in (one.__cause__, one.__context__) if other is not None]


def shortened(value: object, limit: int = 120) -> str:
    """The value's text on one line, cut in the middle where it is longer than `limit`."""
    text = " ".join(str(value).split())
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def kind_of(value: object) -> str:
    """What a value from a recipe is, in words."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
    numbers = {int: "a number", float: "a number", type(None): "nothing"}
    return {**kinds, **numbers}.get(type(value), type(value).__name__)


def unknown(what: str, name: str, known: Iterable[str], hint: str | None = None) -> UserError:
    """The error for an unknown name; it ends with the hint, the nearest name, or all names."""
    if hint is None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        listed = shortened(", ".join(known), 600) or "none yet"
        hint = f"did you mean '{shortened(near[0])}'?" if near else f"known: {listed}."
    return UserError(f"Unknown {what} '{shortened(name)}'; {hint}")
