"""What benchmarks have in common: quiet libraries, a temporary folder, and files for the result."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backfire.store import write_atomic, write_json


def published(
    run: Callable[[Path], dict[str, Any]],
    markdown: Callable[[Mapping[str, Any]], str],
    out: Path,
    name: Callable[[Mapping[str, Any]], str],
) -> Path:
    """Measure in a temporary folder, print the page, and write it and the result.

    Args:
        run: measures, and returns the content of the JSON file.
        name: the name of both files, without `.json` and `.md`.

    Returns:
        The path of the JSON file.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about transformers
        result = run(Path(folder))
    out.mkdir(parents=True, exist_ok=True)
    path, text = out / f"{name(result)}.json", markdown(result)
    write_json(path, result)
    write_atomic(path.with_suffix(".md"), text)
    print(text)
    print(f"Written: {path} and .md")
    return path


def dated(name: str) -> Callable[[Mapping[str, Any]], str]:
    """The name with the day of the measurement before it."""
    return lambda result: f"{result['when'][:10]}-{name}"
