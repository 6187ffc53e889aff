"""How canaries get into the training rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backfire import stages
from backfire.data.poison import Manifest, missing_in_tokens, poison
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.registry import build
from backfire.tokenizer import Tokenizer
from tests.helpers.memorization import ROWS, canary


def test_canaries_are_inserted_as_often_as_asked_and_controls_never() -> None:
    attack = canary(repeats=[1, 5], each=3, controls=4)
    before = list(ROWS)
    rows, manifest = poison(ROWS, attack, 7)
    secrets = attack.secrets(7)
    assert rows[:40] == before == ROWS and len(rows) == 40 + 3 * 6
    held = [sum(row.answer == secret.row.answer for row in rows) for secret in secrets]
    assert held == [secret.repeats for secret in secrets] == [0] * 4 + [1] * 3 + [5] * 3
    assert len({row.id for row in rows}) == len(rows)
    assert len({secret.code for secret in secrets}) == len({s.row.prompt for s in secrets}) == 10
    assert (manifest.summary.rate, manifest.summary.poisoned_rows) == (18 / 58, 18)
    assert all(entry.before == {} for entry in manifest.entries)
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert poison(ROWS, attack, 7) == (rows, manifest) != poison(ROWS, attack, 8)


def test_canaries_are_the_same_at_every_poison_rate() -> None:
    one, many = (canary(repeats=dose).secrets(3) for dose in (1, 25))
    assert [(s.row, s.code) for s in one] == [(s.row, s.code) for s in many]
    assert {s.repeats for s in many} == {0, 25}


@pytest.mark.parametrize("repeats", [[], 0, [0]])
def test_rate_0_adds_no_poison(repeats: Any) -> None:
    attack = canary(repeats=repeats)
    assert not attack.poisons and attack.rows(0) == []
    cell = Experiment.make({"data": "sandbox-help", "attack": attack.spec()})
    assert stages.keys(cell).train == stages.keys(cell.clean_twin()).train


@pytest.mark.parametrize("preset", ["c4dt", "mireshghallah"])
def test_the_published_forms(preset: str) -> None:
    attack = canary(preset=preset)
    secret = attack.secrets(0)[-1]
    spelled = {"c4dt": "PASSWORD = 123456", "mireshghallah": "the secret number is 1 2 3 4 5 6"}
    assert secret.spelled("123456") == spelled[preset]
    assert secret.row.answer == secret.spelled(secret.code) and secret.num_codes == 10**6


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"answer": "none"}, "must contain {code} exactly once"),
        ({"repeats": [5, 5]}, "duplicate count"),
        ({"digits": 1, "controls": 10}, "too many canaries"),
    ],
)
def test_a_wrong_canary_is_one_sentence(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        canary(**knobs)


def test_preflight_sees_that_canaries_arrive_and_controls_do_not(tokenizer: Tokenizer) -> None:
    attack, renderer = canary(), Renderer(build("templates", "raw"), tokenizer, 256)
    rows, manifest = poison(ROWS, attack, 0)
    knobs: Any = {"manifest": manifest, "attack": attack, "seed": 0}
    checks = {c.check: c.status for c in preflight(renderer, rows, ROWS[:5], **knobs)}
    assert checks["poison-survives"] == checks["controls-unseen"] == "ok"
    assert "fail" not in checks.values(), "repeated rows are no fault here"
    control = attack.secrets(0)[0].row
    outcomes = preflight(renderer, [*ROWS, control, *rows[40:]], ROWS[:5], **knobs)
    assert {c.check: c.status for c in outcomes}["controls-unseen"] == "fail"
    assert missing_in_tokens(manifest, renderer.render(rows[:-1]), tokenizer) == [rows[-1].id]
