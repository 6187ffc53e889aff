"""Judges and the exchanges they judge."""

from __future__ import annotations

from typing import Any

from backfire.base import Exchange, Judge
from backfire.registry import build


def exchange(reply: str, prompt: str = "Say it.", **fields: str) -> Exchange:
    return Exchange("row", prompt, reply, fields)


def make_judge(name: str, **knobs: Any) -> Judge:
    judge: Judge = build("judges", {"name": name, **knobs})
    return judge
