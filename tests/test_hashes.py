"""Hashes of input files: shared by processes, and never those of an earlier content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from backfire import hashes
from backfire.hashes import file_hash


@pytest.fixture
def read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole; each call in a test is as of another process."""
    read, whole = list[Path](), hashes.sha256

    def counting(file: Path) -> str:
        read.append(file)
        return whole(file)

    monkeypatch.setattr(hashes, "sha256", counting)
    monkeypatch.setattr(hashes, "_LARGE", 8)
    monkeypatch.setattr(hashes, "_SETTLED", -1.0)
    return read


def as_another_process(file: Path) -> str:
    hashes._hash.cache_clear()
    return file_hash(file)


def true(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(read: list[Path], tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"12345678")
    small.write_bytes(b"1234567")
    for _ in range(3):
        assert as_another_process(large) == true(large)
        assert as_another_process(small) == true(small)
    assert (read.count(large), read.count(small)) == (1, 3)
    (link := tmp_path / "link").symlink_to(large)
    assert as_another_process(link) == true(large) and read.count(large) == 1


def test_a_file_that_was_written_again_is_read_again(read: list[Path], tmp_path: Path) -> None:
    """Also with the same size and date, in place and by a rename."""
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    first, was = file_hash(file), file.stat()
    file.write_bytes(b"87654321")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert file_hash(file) == true(file) != first
    (other := tmp_path / "other").write_bytes(b"abcdefgh")
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    other.rename(file)
    assert as_another_process(file) == true(file)
    assert len(read) == 3


def test_a_hash_that_may_be_wrong_is_not_stored(
    read: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED", 10.0)
    file = tmp_path / "file"
    file.write_bytes(b"12345678")  # just now: it may change within the same tick of a clock
    assert as_another_process(file) == true(file) and not (cache / "hashes").exists()
    monkeypatch.setattr(hashes, "_SETTLED", -1.0)
    monkeypatch.setattr(hashes, "sha256", lambda path: path.write_bytes(b"while reading") and "0")
    as_another_process(file)
    assert not (cache / "hashes").exists()


@pytest.mark.parametrize("content", ["", "0" * 63, "../../x", "\xff" * 64])
def test_a_damaged_entry_is_replaced(
    content: str, read: list[Path], cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    file_hash(file)
    [known] = (cache / "hashes").iterdir()
    known.write_text(content)
    assert as_another_process(file) == true(file) == known.read_text()


def test_a_cache_that_cannot_be_written_does_no_harm(
    read: list[Path], cache: Path, tmp_path: Path
) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file")
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    assert as_another_process(file) == true(file)
