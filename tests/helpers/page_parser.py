"""Reads a page back as tags, attributes and text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from backfire.report.page import write_report


class Seen(HTMLParser):
    """All tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def seen(run: Path) -> Seen:
    return Seen(write_report(run).read_text(encoding="utf-8"))
