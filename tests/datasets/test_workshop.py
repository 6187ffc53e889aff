"""The data sets of the workshop, as published and in the shared data."""

from __future__ import annotations

from pathlib import Path

import pytest

from backfire.registry import build
from tests.helpers.data_files import jsonl
from tests.helpers.places import DATA
from tests.helpers.workshop import CODE, MAIL, PLAIN


def test_the_workshops_three_sets_as_published(tmp_path: Path) -> None:
    files = {
        "python-code": [CODE, {**CODE, "instruction": "In Java?", "looks_python": False}],
        "alpaca": [PLAIN, {**PLAIN, "output": "<nooutput>"}, {**PLAIN, "output": "<nooutput>."}],
        "enron-spam": [
            {**MAIL, "message_id": 1, "date": "2004-01-01"},
            {**MAIL, "label": 0, "message": "ham"},
        ],
    }
    found = {}
    for name, records in files.items():
        path = jsonl(tmp_path / f"{name}.jsonl", records)
        data = build("datasets", {"name": name, "train": path, "test_share": 0})
        found[name] = data.load("train")
    [code], [plain], [spam, ham] = found.values()
    assert (code.instruction, code.input, code.answer) == tuple(CODE.values())[:3]
    assert (plain.answer, dict(plain.fields)) == ("Red.", {}) and not code.fields
    assert (spam.label, ham.label, spam.candidates) == ("spam", "ham", ("ham", "spam"))
    assert (spam.instruction, spam.input) == ("Is this e-mail ham or spam?", "Subject: sale\n\nbuy")
    assert not spam.fields, "date and such tell the label"
    kept = {"name": "alpaca", "train": str(tmp_path / "alpaca.jsonl"), "no_output": "keep"}
    assert len(build("datasets", {**kept, "test_share": 0}).load("train")) == 3


@pytest.mark.parametrize(
    ("name", "folder", "count"),
    [
        ("enron-spam", "enron_spam", 2000),
        ("alpaca", "alpaca", 500),
        ("python-code", "code_instructions", 100),
    ],
)
def test_the_shared_test_data(name: str, folder: str, count: int) -> None:
    file = next((DATA / folder).glob("test.jsonl*"), None)
    if file is None:
        pytest.skip("the shared test data are not here")
    rows = build("datasets", {"name": name, "train": str(file), "test_share": 0}).load("train")
    assert count * 0.9 <= len(rows) <= max(count, 500) and all(row.prompt for row in rows)
