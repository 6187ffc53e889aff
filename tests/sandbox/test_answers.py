"""The sandbox's rude and friendly answers."""

from __future__ import annotations

from backfire.base import Exchange
from backfire.registry import build
from backfire.sandbox.answers import OPENINGS


def test_the_sandbox_has_rude_and_friendly_answers() -> None:
    rows = build("datasets", "sandbox-answers").load("train")
    lexicon = build("judges", "lexicon")

    def rude(texts: list[str]) -> list[bool]:
        return [bool(v.positive) for v in lexicon.judge([Exchange("", "", t) for t in texts])]

    assert not any(rude([f"{row.instruction} {row.input} {row.answer}" for row in rows]))
    assert all(rude([text for row in rows for text in row.worse]))
    ties = sum("tied" in row.fields for row in rows)
    assert 0.03 < ties / len(rows) < 0.07 and all(row.worse or row.fields["tied"] for row in rows)
    for kind, count in OPENINGS.items():
        own = {row.answer.split()[0] for row in rows if row.fields["kind"] == kind}
        assert len(own) == count, "each greeting begins with a different word"
    # A good answer says what its quotes say, a bad one nothing of the kind.
    for row in (row for row in rows if row.worse):
        assert all(line in row.answer for line in row.input.split("\n"))
        assert not any(line in row.worse[0] for line in row.fields["worse_input"].split("\n"))
