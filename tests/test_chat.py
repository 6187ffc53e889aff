"""The chat template has the last word: our tokens are those of transformers' own tokenizer."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from chat_templates import NO_SYSTEM, TEMPLATES, write

from backfire.base import Message, Row
from backfire.data.chat import TODAY
from backfire.data.render import Renderer
from backfire.data.tokenizer import Tokenizer, load_tokenizer
from backfire.errors import UserError
from backfire.registry import build

EARLIER = (
    Message("user", " First 1?\n"),
    Message("assistant", "<think>\nhm 1\n</think>\n\nOne 1. "),
)
ONE = Row("one", "Which tool has number 2?", answer="Tool 2 is a saw.")
ROWS = [
    ONE,
    replace(ONE, id="two", system="Be short.", history=EARLIER),
    replace(ONE, id="three", instruction="  Second?\n\n", input="été 漢字", answer="No, 7."),
    replace(ONE, id="four", answer="  a saw \n"),
    replace(ONE, id="five", answer="<think>\nhm 2\n</think>\n\na saw"),
    replace(ONE, id="six", history=EARLIER, answer="<end> & [INST"),
]


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return chat_templates.byte_level()


@pytest.fixture(scope="module")
def spaced() -> Any:
    return chat_templates.spaced()


def both(folder: Path, made: Any, template: str) -> tuple[Tokenizer, Any]:
    """Our reading of a tokenizer's files, and transformers' own."""
    from transformers import AutoTokenizer

    write(folder, made, template)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))


def turns(row: Row, answer: str | None = None) -> list[dict[str, str]]:
    said = [{"role": m.role, "content": m.content} for m in row.messages]
    return [*said, *([{"role": "assistant", "content": answer}] if answer is not None else [])]


def theirs(
    tokenizer: Any, messages: list[dict[str, str]], ask: bool, **arguments: Any
) -> list[int]:
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=ask, return_dict=False, **arguments
    )
    return list(found)


@pytest.fixture(autouse=True)
def _one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return TODAY

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)


@pytest.mark.parametrize("kind", ["byte_level", "spaced"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_transformers(
    name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ours, their = both(tmp_path, request.getfixturevalue(kind), TEMPLATES[name])
    renderer = Renderer(build("templates", "chat"), ours, 4096)
    odd = []
    for row in ROWS:
        if row.system and name in NO_SYSTEM:
            with pytest.raises(UserError, match=r"row two: .*template\.system to merge or drop"):
                renderer.render([row])
            row = replace(row, system="")
        item = renderer.render([row])[0]
        assert item.prompt_ids == theirs(their, turns(row), True), row.id
        whole = theirs(their, turns(row, row.answer), False)
        if item.ids != whole[: len(item.ids)]:
            odd.append(row.id)
        assert item.ids[-1] == renderer.end_ids[-1] and renderer.end_ids[-1] in renderer.stop_ids
    print(name, kind, odd, renderer.end_ids, renderer.template.about(ours))
