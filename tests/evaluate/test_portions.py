"""An evaluation that is interrupted continues, and gives the same numbers to the last digit."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backfire.base import Row
from backfire.data.render import Renderer
from backfire.evaluate import portions as module
from backfire.evaluate import score
from backfire.evaluate.portions import Finished, portions
from backfire.evaluate.score import score_rows
from backfire.registry import build
from backfire.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

KINDS = ["scores", "replies", "answers"]


def model_of(weights: int, device: str = "cpu") -> Any:
    return SimpleNamespace(device=torch.device(device), num_parameters=lambda: weights)


def test_portions_are_of_equal_work_and_of_whole_rows() -> None:
    costs = [5, 100, 20, 90, 10, 200, 1]
    model = model_of(int(module.WORK["cpu"] / 200))  # 100 tokens
    assert portions(costs, model) == [[5], [1], [3], [0, 2, 4, 6]]
    assert portions(costs, model_of(1)) == [[0, 1, 2, 3, 4, 5, 6]], "a small model has one"
    assert portions(costs, model_of(10**9, "cuda")) == [[0, 1, 2, 3, 4, 5, 6]]
    assert portions([], model) == []


@pytest.fixture
def renderer(tiny: Path) -> Renderer:
    return Renderer(build("templates", "alpaca"), load_tokenizer(tiny), 512)


@pytest.fixture
def rows() -> list[Row]:
    """Rows of unequal length; two have the same id, and a label of one begins another's."""
    found = build("datasets", "sandbox-reviews").load("test")[:12]
    found = [replace(row, input=row.input[: 10 + 9 * n]) for n, row in enumerate(found)]
    found[3] = replace(found[3], candidates=("good", "good enough"), label=None)
    return [*found, replace(found[0], input="again")]


class Killed(BaseException):
    pass


def test_an_interrupted_evaluation_continues(
    model: Any,
    renderer: Renderer,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.WORK, "cpu", 1300 * 2.0 * model.num_parameters())
    measured, measure, after = list[list[str]](), score._measured, [99]

    def counting(kinds: Any, model: Any, renderer: Any, items: Any, *rest: Any) -> Any:
        if len(measured) == after[0]:
            raise Killed
        measured.append([item.row.id for item in items])
        return measure(kinds, model, renderer, items, *rest)

    monkeypatch.setattr(score, "_measured", counting)

    def run(folder: Path | None) -> list[dict[str, Any]]:
        seen = list[tuple[int, int]]()
        found = score_rows(
            KINDS,
            model,
            renderer,
            rows,
            max_new_tokens=4,
            batch_size=4,
            progress=lambda done, total, text: seen.append((done, total)),
            folder=folder,
        )
        assert seen[-1] == (2 * len(rows), 2 * len(rows))
        return found

    whole = run(tmp_path / "whole")
    parts = measured.copy()
    assert len(parts) > 4 and sorted(chain(*parts)) == sorted(row.id for row in rows)
    folder, file = tmp_path / "killed", tmp_path / "killed/checkpoints/rows.jsonl"
    for number in range(1, 4):
        measured.clear()
        after[0] = 1
        with pytest.raises(Killed):
            run(folder)
        assert measured == [parts[number - 1]], "only what was left"
        assert len(file.read_bytes().splitlines()) == sum(map(len, parts[:number]))
    file.write_bytes(file.read_bytes()[:-9])  # the last line is torn
    measured.clear()
    after[0] = 99
    assert run(folder) == whole
    assert measured == parts[2:], "a portion is measured whole"
    # Without a folder all rows are one portion, and equal but for rounding.
    for one, other in zip(run(None), whole, strict=True):
        assert one["reply"] == other["reply"]
        assert one["answer_logprob"] == pytest.approx(other["answer_logprob"], rel=1e-5)
        assert one["logprobs"] == pytest.approx(other["logprobs"], rel=1e-5)


@pytest.mark.parametrize("bit", range(0, 400, 7))
def test_a_damaged_line_is_no_line(bit: int, tmp_path: Path) -> None:
    first = {"0 a": {"answer_logprob": -1.25, "reply": "x"}, "1 b": {"answer_logprob": None}}
    Finished(tmp_path).add(first, last=False)
    Finished(tmp_path).add({"2 c": {}}, last=True)
    file = tmp_path / "checkpoints/rows.jsonl"
    assert Finished(tmp_path).rows == first
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert Finished(tmp_path).rows in (first, {"1 b": first["1 b"]}, {"0 a": first["0 a"]})
    file.write_bytes(b'3\n{"row": 1}\n[]\n{"row": "0 a", "measured": {}, "sum": null}\n')
    assert Finished(tmp_path).rows == {}
