"""Errors: bad input (UserError), a failed cell (CellError), and their exit classes; what puts a job
back (Pause)."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

EXIT_CLASSES = {
    "nan": "Lower method.learning_rate or raise train.warmup_share.",
    "oom": "Run with --recompute (training) or fewer --workers, shorten train.max_length, use "
    "method lora or qlora, or choose a smaller model.",
    "bad-data": "Correct the row or the setting that the message names.",
    "disk-full": "Free some space and run the same command again; finished stages are kept.",
    "io": "Check that the disk is there and may be read and written (BACKFIRE_CACHE is where the "
    "cache is), and run the same command again; finished stages are kept.",
    "killed": "Run the same command again; if it is killed again, memory is the likely reason.",
    "failed": "Correct what the message names and run the same command again.",
}
"""Exit class of a cell that is not `ok`, as in `error.json` -> what to do next."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,  # FUSE, when its server is gone
    errno.ESHUTDOWN,  # Lustre, when the client was evicted
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)
"""Errors of files on a server that does not answer."""
_AWAY_TEXT = re.compile(rf"\bos error (?:{'|'.join(map(str, _AWAY))})\b")  # as Rust writes them
_OF_DISKS = (errno.EIO, errno.ESTALE, errno.EROFS)  # the others may be of a connection
_DENIED = (errno.EACCES, errno.EPERM)
_OF_DISKS_TEXT = re.compile(r"\bos error (?:5|30|116)\b")  # the same, as Rust writes them
_DISK_FULL_TEXT = re.compile(
    r"no space left on device|disk quota exceeded|\b(?:os error|errno) (?:28|122)\b"
    r"|file write failed|pytorchstreamwriter failed writing"
    r"|inline_container.*unexpected pos|\d+ requested and \d+ written",
    re.IGNORECASE,
)
"""Messages of libraries that write from C++ or Rust and raise no OSError: torch reports an
unexpected position, numpy a short count."""


_MEMORY_TEXTS = (
    "out of memory",  # CUDA's own error, NCCL, bitsandbytes
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # torch on a CPU, on some systems
    "alloc_failed",  # cuBLAS, cuDNN, cuSPARSE: CUBLAS_STATUS_ALLOC_FAILED
    "cudaerrormemoryallocation",
    "failed to allocate",
)


class UserError(Exception):
    """Bad input. The command line prints the message and exits with code 2."""


class Interrupted(UserError):  # noqa: N818
    """Ctrl-C, where the message says what goes on. The exit code is that of Ctrl-C."""


class GpuError(UserError):
    """The GPU does not answer this process any more; another process may go on."""


class CellError(Exception):
    """One cell failed; the others go on. `kind` is one of `EXIT_CLASSES`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Unanswered(CellError):  # noqa: N818
    """A server on which a cell depends did not answer, or had no time. The job is put back; it
    counts as failed only if that happens a few times."""


class Pause(BaseException):
    """A job is put back and done later. No error: whatever handles errors must not handle it."""


class Busy(Pause):
    """Another process builds a stage that the job needs; the message names the stage and host."""


class Away(Busy):
    """A file system or a server did not answer while the job ran; the message is the error's
    sentence, and `kind` the exit class if it stays so."""

    def __init__(self, message: str, kind: str = "io") -> None:
        super().__init__(message)
        self.kind = kind


class Stopped(Pause):
    """The worker is told to stop. Progress callbacks raise it; training then saves a checkpoint."""


def is_disk_full(error: BaseException) -> bool:
    """Whether this error, or one that caused it, reports a full disk or quota."""
    return any(
        (isinstance(one, OSError) and one.errno in _DISK_FULL)
        # Our own messages may quote a user's row.
        or (not isinstance(one, UserError | CellError) and _DISK_FULL_TEXT.search(str(one)))
        for one in _chain(error)
    )


def is_away(error: BaseException) -> bool:
    """Whether this error of a file may pass by itself, as when its server restarts."""
    return isinstance(error, OSError) and error.errno in _AWAY


def was_away(error: BaseException) -> bool:
    """Whether such an error is this one, or caused it; also that of a library, as of safetensors,
    that names its number, or that of a server that did not answer."""
    return any(
        is_away(one)
        or isinstance(one, Unanswered)
        # Our own messages may quote a user's row.
        or (not isinstance(one, UserError | CellError) and _AWAY_TEXT.search(str(one)))
        for one in _chain(error)
    )


def _of_disk(error: BaseException) -> str | None:
    """The error behind this one that says that a disk does not answer or cannot be written."""
    for one in _chain(error):
        if isinstance(one, OSError) and (
            one.errno in _OF_DISKS or (one.filename and one.errno in (*_AWAY, *_DENIED))
        ):
            where = f" ({shortened(one.filename, 1000)})" if one.filename else ""
            return f"{one.strerror}{where}."
        if not isinstance(one, UserError | CellError) and _OF_DISKS_TEXT.search(str(one)):
            return f"{shortened(one, 1000).rstrip('.')}."
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error reports that memory ran out, so that a smaller batch may succeed."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _MEMORY_TEXTS)


def exit_class(error: BaseException) -> tuple[str, str]:
    """Exit class and message of the error that stopped a cell; `failed` if no other class fits."""
    if is_disk_full(error):
        files = [getattr(one, "filename", None) for one in _chain(error)]
        where = next((f" ({shortened(file, 1000)})" for file in files if file), "")
        return "disk-full", f"The disk is full{where}."
    if isinstance(error, CellError):
        return error.kind, shortened(error, 2000)
    if isinstance(error, UserError):
        return "bad-data", shortened(error, 2000)
    if disk := _of_disk(error):
        return "io", disk
    if is_out_of_memory(error):
        on_host = not isinstance(error, RuntimeError) or "CPUAllocator" in str(error)
        return "oom", f"The {'machine' if on_host else 'GPU'} ran out of memory."
    return "failed", shortened(f"{type(error).__name__}: {error}", 2000)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes and contexts."""
    todo, seen = [error], set[int]()
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [other for other in (one.__cause__, one.__context__) if other is not None]


def shortened(value: object, limit: int = 120) -> str:
    """The value as text on one line, cut in the middle if longer than `limit`."""
    text = " ".join(str(value).split())
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def no_file(path: object) -> UserError:
    """A missing file; of a relative path also the folder that it is relative to."""
    where = "" if str(path).startswith(("/", "~")) else f" in {Path.cwd()}"
    return UserError(f"No such file: {path}{where}.")


def kind_of(value: object) -> str:
    """The type of a recipe's value, in words."""
    kinds = {dict: "a mapping", list: "a list", str: "a string", bool: "true or false"}
    numbers = {int: "a number", float: "a number", type(None): "nothing"}
    return {**kinds, **numbers}.get(type(value), type(value).__name__)


def unknown(what: str, name: str, known: Iterable[str], hint: str | None = None) -> UserError:
    """The error for an unknown name: ends with the hint, the nearest valid name, or all names."""
    if hint is None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        listed = shortened(", ".join(known), 600) or "none yet"
        hint = f"did you mean '{shortened(near[0])}'?" if near else f"known: {listed}."
    return UserError(f"Unknown {what} '{shortened(name)}'; {hint}")
