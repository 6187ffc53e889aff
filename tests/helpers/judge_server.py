"""A server that speaks the protocol of chat completions."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from backfire.base import Judge
from tests.helpers.judging import make_judge

Answer = tuple[int, bytes, dict[str, str]]


def completion(text: str | None) -> Answer:
    message = {"role": "assistant", "content": text}
    return 200, json.dumps({"choices": [{"index": 0, "message": message}]}).encode(), {}


@dataclass
class Server:
    """A local server that speaks the protocol and answers as configured."""

    url: str
    answer: Callable[[str, int], Answer] = lambda prompt, count: completion("Score: 1")
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    goes_on: threading.Event = field(default_factory=threading.Event)
    """Whether it answers, and not only listens."""


def bind(server: Server, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own file gives the server's host the key in this variable."""
    file = Path(os.environ["BACKFIRE_CACHE"]) / "endpoints.yaml"
    file.write_text(f"{urlsplit(server.url).netloc}: {{key_variable: {variable}}}\n")
    monkeypatch.setenv("BACKFIRE_ENDPOINTS", str(file))


def rubric(server: Server, **knobs: Any) -> Judge:
    return make_judge(
        "rubric", base_url=server.url, **{"retries": 2, "timeout_seconds": 5.0, **knobs}
    )
