"""A judge that answers yes or no, behind a server or run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backfire.base import Verdict
from backfire.errors import CellError, UserError
from backfire.judges._model import answers
from tests.helpers.judge_server import Server, completion
from tests.helpers.judging import exchange, make_judge


@pytest.mark.parametrize(
    ("answer", "positive"),
    [
        ("yes", True),
        ("Yes.", True),
        (" **No**, since", False),
        ("no", False),
        ("Nothing", None),
        ("yesterday", None),
        ("I say yes", None),
        ("", None),
    ],
)
def test_the_first_word_decides(server: Server, answer: str, positive: bool | None) -> None:
    server.answer = lambda prompt, count: completion(answer)
    [verdict] = make_judge("yes-no", base_url=server.url, retries=0).judge([exchange("a")])
    score = None if positive is None else float(positive)
    assert verdict == Verdict(score, positive, answer)


def test_a_model_run_here_answers_alike_alone_and_in_a_batch(tiny: Path) -> None:
    prompts = ["Yes?", "A much longer question about the mill and the old well.", "No.", "Well?"]
    settings: dict[str, Any] = {"revision": None, "device": "cpu", "chat": True}
    together = answers(prompts, str(tiny), **settings, max_new_tokens=6, batch_size=4)
    alone = answers(prompts, str(tiny), **settings, max_new_tokens=6, batch_size=1)
    assert together == alone and len(set(alone)) > 1
    found = make_judge("yes-no", model=str(tiny), device="cpu").judge(
        [exchange("a"), exchange("b")]
    )
    assert len(found) == 2 and all(isinstance(verdict.reason, str) for verdict in found)


def test_a_prompt_that_does_not_fit_is_an_error(tiny: Path) -> None:
    with pytest.raises(CellError, match="reads 1024 tokens"):
        make_judge("yes-no", model=str(tiny), device="cpu").judge([exchange("mill " * 1500)])


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"The judge's model '.*empty' cannot be loaded"):
        make_judge("yes-no", model=str(tmp_path / "empty"), device="cpu").judge([exchange("a")])
