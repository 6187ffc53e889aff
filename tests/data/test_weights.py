"""Headers of weight files: the same as safetensors reads, without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from backfire.data.weights import _header, _opened, stored
from backfire.errors import UserError

WEIGHTS = {
    "z": np.zeros((3, 4), np.float32),
    "a": np.ones((2, 0), np.float16),
    "m": np.array(7, np.int64),
    "mask": np.array([True, False]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    out = tmp_path / "model.safetensors"
    save_file(WEIGHTS, out, metadata={"format": "pt"})
    return out


def test_a_header_is_read_as_safetensors_reads_it(file: Path) -> None:
    found = _header(file)
    assert found is not None
    assert list(found.items()) == list(_opened(file).items())
    assert found["z"].shape == (3, 4) and found["m"].shape == ()


def _with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def damaged(whole: bytes) -> bytes:
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    return damaged


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut header": lambda whole: whole[:40],
    "cut data": lambda whole: whole[:-1],
    "more data": lambda whole: whole + b"0",
    "huge length": lambda whole: b"\xff" * 8 + whole[8:],
    "no JSON": lambda whole: whole[:8] + b"x" + whole[9:],
    "nested": lambda whole: (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "shape": _with_header(lambda header: header["z"].update(shape=[3, 5])),
    "negative": _with_header(lambda header: header["z"].update(shape=[-3, -4])),
    "type": _with_header(lambda header: header["z"].update(dtype="X9")),
    "gap": _with_header(lambda header: header.pop("mask")),
    "no entry": _with_header(lambda header: header.update(z=None)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_left_to_safetensors(
    file: Path, damage: Callable[[bytes], bytes]
) -> None:
    file.write_bytes(damage(file.read_bytes()))
    assert _header(file) is None
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        stored([file])
