"""Where things are: this checkout, and the test data that may lie next to it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"
LLAMA = SHARED / "models" / "llama2_tokenizer" / "tokenizer.bin"


def shared(*names: str) -> list[str]:
    """Files of the shared test data; the test is skipped where one is missing."""
    files = [DATA / name for name in names]
    if not all(file.is_file() for file in files):
        pytest.skip(f"the shared test data is not here: {', '.join(names)}")
    return [str(file) for file in files]
