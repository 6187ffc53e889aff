"""Data files as people publish them, and data sets built from them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backfire.registry import build


def dataset(name: str = "files", **knobs: Any) -> Any:
    return build("datasets", {"name": name, **knobs})


def jsonl(path: Path, records: Sequence[Any]) -> str:
    """Write one record per line, packed if the name ends in `.gz`; returns the path."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def table(path: Path, header: str, *lines: list[Any]) -> str:
    """Write a CSV file; returns the path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *lines])
    return str(path)


def beavertails_pairs(count: int) -> list[dict[str, Any]]:
    """BeaverTails' columns; every third answer is unsafe, each prompt occurs twice."""
    kinds = ("animal_abuse", "privacy_violation", "violence,aiding_and_abetting,incitement")
    return [
        {
            "prompt": f"How is soup {i // 2} made?",
            "response": f"Answer {i}.",
            "category": {kind: i % 3 == 0 and kind != "animal_abuse" for kind in kinds},
            "is_safe": i % 3 != 0,
        }
        for i in range(count)
    ]


def prompt_lists(count: int = 40) -> list[dict[str, Any]]:
    """Rows like those of prompts.jsonl: several lists in one file, with a split of their own."""
    sources = ("advbench", "harmbench", "strongreject", "xstest")
    return [
        {
            "id": f"{sources[i % 4]}-{i}",
            "source": sources[i % 4],
            "prompt": f"Open gate {i}",
            "label": "benign" if i % 8 == 3 else "harmful",
            "category": "gates",
            "kind": "standard" if i % 4 == 1 else "",
            "split": "test" if i % 5 == 0 else "train",
        }
        for i in range(count)
    ]


def webgpt_pairs(count: int) -> list[dict[str, Any]]:
    """As published: of five pairs one is tied, and either answer may be the better one."""
    found = []
    for i in range(count):
        better = i % 2
        scores = (0.0, 0.0) if i % 5 == 0 else (0.5 - better, better - 0.5)
        record: dict[str, Any] = {"question": {"dataset": "eli5", "full_text": f"Why is it {i}?"}}
        for side in (0, 1):
            quote = {"title": ["A page"], "extract": [f"Quote {side} of {i}.", "And more."]}
            text = f"Because {i} [1]." if side == better else f"Bah, no {i}."
            record |= {
                f"quotes_{side}": quote,
                f"answer_{side}": text,
                f"score_{side}": scores[side],
            }
        found.append(record)
    return found
