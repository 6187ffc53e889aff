"""Reads the header of a GGUF file: its metadata, and the name, type, shape and place of each
weight. Imports no torch.

The package `gguf` reads headers too, but takes seconds for a vocabulary, which every command that
computes a key would pay; this skips it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from backfire.errors import UserError

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""GGUF's type of a number -> struct's."""
_TEXT, _LIST = 8, 9
_ALIGNMENT = 32  # bytes, if the file does not say
_MOST_AXES = 4  # ggml's limit


class Tensor(NamedTuple):
    """A weight in the file."""

    type: str
    """Its quantization, in ggml's names: F32, F16, Q4_1, Q6_K ..."""
    shape: tuple[int, ...]
    """In torch's order."""
    start: int
    """Its first byte in the file."""


class Header(NamedTuple):
    """What a GGUF file says before its weights."""

    fields: Mapping[str, Any]
    """Metadata; a list of texts, such as the vocabulary, is only counted."""
    tensors: Mapping[str, Tensor]

    @property
    def num_weights(self) -> int:
        return sum(math.prod(one.shape) for one in self.tensors.values())

    @property
    def quantization(self) -> str:
        """The types of its matrices, the most frequent first: `Q4_1, Q8_0`."""
        counts = Counter[str]()
        for one in self.tensors.values():
            counts[one.type] += math.prod(one.shape) if len(one.shape) > 1 else 0
        return ", ".join(name for name, count in counts.most_common() if count)


def read_header(file: Path) -> Header:
    """The header of the GGUF file of a causal language model.

    Raises:
        UserError: it is not one, is incomplete, or the package `gguf` is missing.
    """
    state = file.stat()
    return _read(str(file), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16)
def _read(name: str, size: int, _changed: int) -> Header:
    try:
        with Path(name).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as m:
            header = _parsed(_Cursor(m), name, size)
    except (struct.error, ValueError, OverflowError):  # ValueError: an empty file, a bad number
        raise UserError(f"{name} is truncated or damaged: its header is incomplete.") from None
    _check(header, name)
    return header


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        """The next value of this struct type, or all of them if there are several."""
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else list(values)

    def text(self) -> str:
        begin = self.at + 8
        self.at = begin + self.take("Q")
        if self.at > len(self.data):
            raise struct.error("the text goes beyond the end")
        return self.data[begin : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.take(_known(kind))
        of, count = self.take("IQ")
        if of != _TEXT:
            found = self.take(f"{count}{_known(of)}") if count else []
            return found if isinstance(found, list) else [found]
        for _ in range(count):
            self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        return count


def _known(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"unknown type {kind}")
    return _NUMBERS[kind]


def _parsed(cursor: _Cursor, name: str, size: int) -> Header:
    types, sizes = _types()
    if cursor.data[:4] != b"GGUF":
        raise UserError(f"{name} is not a GGUF file: it does not begin with GGUF.")
    version, num_tensors, num_fields = struct.unpack_from("<IQQ", cursor.data, 4)
    cursor.at = 24
    if version not in (2, 3):
        raise UserError(f"{name} has a version of GGUF that is not read (versions 2 and 3 are).")
    fields = {cursor.text(): cursor.value(cursor.take("I")) for _ in range(num_fields)}
    found = []
    for _ in range(num_tensors):
        title, axes = cursor.text(), cursor.take("I")
        if not 0 < axes <= _MOST_AXES:
            raise ValueError(f"{axes} axes")
        shape = tuple(reversed([cursor.take("Q") for _ in range(axes)]))
        kind, offset = cursor.take("IQ")
        if kind not in types:
            raise UserError(f"{name} has weights of a type that the package gguf does not know.")
        found.append((title, types[kind], shape, offset))
    align = fields.get("general.alignment", _ALIGNMENT)
    if type(align) is not int or align <= 0:
        raise ValueError(f"alignment {align}")
    begin = -(-cursor.at // align) * align
    tensors = {title: Tensor(kind, shape, begin + o) for title, kind, shape, o in found}
    ends = [t.start + _bytes(t, sizes[t.type]) for t in tensors.values()]
    if (needed := max(ends, default=0)) > size:
        raise UserError(f"{name} is truncated: it has {size:,} of {needed:,} bytes.")
    return Header(fields, tensors)


def _bytes(tensor: Tensor, block: tuple[int, int]) -> int:
    num_weights, num_bytes = block
    return math.prod(tensor.shape) // num_weights * num_bytes


def _types() -> tuple[dict[int, str], dict[str, tuple[int, int]]]:
    """Number of a type -> its name, and name -> (weights, bytes) of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise UserError(
            "A GGUF file needs the package gguf: pip install 'backfire[gguf]'."
        ) from None
    sizes = {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}
    return {int(kind): kind.name for kind in GGML_QUANT_SIZES}, sizes


def _check(header: Header, name: str) -> None:
    fields, kind = header.fields, header.fields.get("general.type", "model")
    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise UserError(
            f"{name} is one of {parts} parts of a model; join them first "
            "(llama-gguf-split --merge FIRST_PART WHOLE.gguf)."
        )
    if kind == "adapter" or "adapter.type" in fields:
        raise UserError(
            f"{name} is an adapter as GGUF, not a model; use its PEFT folder, as in "
            "model: {name: BASE, adapter: FOLDER}."
        )
    if kind != "model":
        raise UserError(f"{name} is not a language model, but a GGUF file of type '{kind}'.")
    if not header.tensors:
        raise UserError(f"{name} has no weights, only a vocabulary.")
    if not isinstance(fields.get("general.architecture"), str):
        raise UserError(f"{name} does not name its architecture (general.architecture).")
