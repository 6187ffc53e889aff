"""The error class of a cell names the true cause, whichever library raised the error."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from backfire.errors import (
    EXIT_CLASSES,
    CellError,
    Unanswered,
    UserError,
    exit_class,
    is_away,
    shortened,
    unknown,
    was_away,
)

FULL = Path("/dev/full")
"""Every write to it fails. Only for writers that open the file they are given: safetensors puts
another in its place."""


def raised(act: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        act()
    return caught.value


def led_to(first: Exception, then: Exception) -> Callable[[], None]:
    def act() -> None:
        try:
            raise first
        except Exception:
            raise then from None

    return act


def _torch_archive() -> None:
    import torch

    torch.save({"w": torch.zeros(1000, 100)}, FULL)


def _torch_stream() -> None:
    import torch

    with FULL.open("wb") as file:
        torch.save({"w": torch.zeros(1000, 100)}, file)


def _gzip() -> None:
    with gzip.open(FULL, "wb") as file:
        file.write(os.urandom(100_000))


def _parquet() -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"a": list(range(50_000))})
    with pyarrow.OSFile(str(FULL), "wb") as file:
        parquet.write_table(table, file)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("write", [_torch_archive, _torch_stream, _gzip, _parquet])
def test_a_full_disk_is_recognized_whichever_library_writes(write: Callable[[], None]) -> None:
    assert exit_class(raised(write)) == ("disk-full", "The disk is full.")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), "disk-full"),
        (OSError(122, "Disk quota exceeded"), "disk-full"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "disk-full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write"), "disk-full"),
        (RuntimeError("[inline_container.cc:672] . unexpected pos 576 vs 534"), "disk-full"),
        (Exception("No space left on device (os error 28)"), "disk-full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk-full"),
        (OSError("100000 requested and 20464 written"), "disk-full"),
        (OSError(5, "Input/output error"), "io"),
        (OSError(116, "Stale file handle", "/shared/x"), "io"),
        (OSError(30, "Read-only file system", "/cache"), "io"),
        (PermissionError(13, "Permission denied", "/cache"), "io"),
        (RuntimeError("I/O error: Stale file handle (os error 116)"), "io"),
        (TimeoutError(110, "Connection timed out"), "failed"),  # of a server
        (FileNotFoundError(2, "No such file or directory", "/x"), "failed"),
        (OSError(12, "Cannot allocate memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "oom"),
        (OSError(13, "Permission denied"), "failed"),
        (RuntimeError("curl error 28: it took too long"), "failed"),
        (UserError("Label 'No space left on device' is unknown."), "bad-data"),
        (CellError("nan", "Loss is nan after 'disk quota exceeded'."), "nan"),
    ],
    ids=str,
)  # fmt: skip
def test_every_error_has_an_exit_class(error: Exception, kind: str) -> None:
    assert exit_class(error)[0] == kind
    assert kind in EXIT_CLASSES


def test_what_led_to_an_error_counts() -> None:
    full = OSError(28, "No space left on device")
    assert exit_class(raised(led_to(full, RuntimeError("odd"))))[0] == "disk-full"
    assert exit_class(raised(led_to(full, UserError("It cannot be fetched."))))[0] == "disk-full"


def test_an_unknown_name_is_reported_briefly() -> None:
    many = [f"column_{n}" for n in range(5000)]
    assert len(str(unknown("column", "?" * 9000, many))) < 900
    assert shortened("a\n b") == "a b" and len(shortened("x" * 999, 100)) <= 100


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError("without a number"), False),
        (ValueError("5"), False),
        (SafetensorError("I/O error: Transport endpoint is not connected (os error 107)"), True),
        (SafetensorError("I/O error: No such file or directory (os error 2)"), False),
        (UserError("The row 'os error 5' has no answer."), False),
        (Unanswered("failed", "The judge's server failed 6 times."), True),
    ],
)
def test_what_may_pass_by_itself(error: Exception, away: bool) -> None:
    """A file server that restarts; also if another error tells of it."""
    assert was_away(error) == away and is_away(error) == (away and isinstance(error, OSError))
    assert was_away(raised(led_to(error, RuntimeError("torn")))) == away


@pytest.mark.parametrize(("names", "end"), [(("a/b.txt",), " (a/b.txt)."), ((), ".")])
def test_a_disk_that_fails_is_named_with_its_file(names: tuple[str, ...], end: str) -> None:
    kind, sentence = exit_class(OSError(errno.EIO, "Input/output error", *names))
    assert (kind, sentence) == ("io", f"Input/output error{end}")
