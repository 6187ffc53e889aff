"""Defense `scan` removes what its scanner ranks highest, and says how well that was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backfire.base import NOTHING, Evidence, Row, as_learned
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.pipeline.filtering import filtered
from backfire.registry import build
from backfire.scan.source import Bare
from backfire.store import Store
from tests.helpers.command_line import Run
from tests.helpers.scanned import free
from tests.scanners.test_lift import SORRY, inside, plant

PLACES = range(3, 1000, 20)  # 50 rows
ROWS = plant(free(1000), PLACES, inside, SORRY)
BAD = frozenset(f"f{place}" for place in PLACES)


def removed(rows: list[Row] = ROWS, bad: frozenset[str] = BAD, **knobs: Any) -> set[str]:
    defense = build("defenses", {"name": "scan", **knobs})
    left = defense.filter(rows, [], bad, Random(0))
    assert [row for row in rows if row in left] == left
    return {row.id for row in rows} - {row.id for row in left}


def test_the_poisoned_rows_are_removed() -> None:
    assert removed() == BAD
    assert removed(scanner={"name": "repetition", "support": 20}) == BAD
    few = removed(remove=0.02)
    assert len(few) == 20 and few < BAD
    assert removed(remove=0.05) == BAD


def test_null_and_oracle_remove_as_many() -> None:
    random = removed(null=True)
    assert len(random) == 50 and len(random & BAD) < 12
    assert removed(oracle=True, remove=0.02) < BAD
    assert len(removed(oracle=True, remove=0.02)) == 20


def test_an_unknown_scanner_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'lift'"):
        build("defenses", {"name": "scan", "scanner": "lfit"})


def test_the_metric_agrees_with_a_count_by_hand() -> None:
    wrong = frozenset([*sorted(BAD)[:40], *(f"f{n}" for n in range(0, 400, 40))])
    facts = build("defenses", "scan").facts(ROWS, wrong)
    metric: Any = build("metrics", "scan")
    values = {value.metric: value for value in metric.measure(Evidence(training=facts))}
    assert values["scan_precision"].value == 40 / 50
    assert values["scan_recall_at_5"].value == 40 / 50
    assert values["clean_flag_rate"].value == 10 / 950
    assert values["scan_auroc"].value == pytest.approx(0.9, abs=0.05)
    assert values["scan_precision"].low < 0.8 < values["scan_precision"].high
    assert metric.measure(Evidence()) == []


@pytest.mark.parametrize(("knob", "found"), [("oracle", (1.0, 1.0)), ("null", (0.0, 0.3))])
def test_precision_is_that_of_what_was_removed(knob: str, found: tuple[float, float]) -> None:
    defense = build("defenses", {"name": "scan", knob: True})
    left = defense.filter(ROWS, [], BAD, Random(0))
    facts = defense.facts(ROWS, BAD)["scan"]
    hits, count = facts["precision"]
    assert count == len(ROWS) - len(left) > 0 and found[0] <= hits / count <= found[1]


@pytest.mark.parametrize("scanner", ["overlap", {"name": "overlap", "words": 2}])
def test_a_scanner_that_needs_test_rows_is_refused(scanner: Any, backfire: Run) -> None:
    with pytest.raises(UserError, match="gives its scanner no test rows, which scanner 'overlap'"):
        build("defenses", {"name": "scan", "scanner": scanner})
    done = backfire("validate", "tour", "defense={name: scan, scanner: overlap}")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "remove such rows from the file by `backfire scan --test ... --write`" in done.err


def test_the_interval_of_recall_counts_the_threshold() -> None:
    facts = build("defenses", "scan").facts(ROWS[:300], BAD)
    metric: Any = build("metrics", "scan")
    values = {value.metric: value for value in metric.measure(Evidence(training=facts))}
    assert facts["scan"]["recall_at_1_range"][0] == 0  # 285 clean rows are too few
    assert (values["scan_recall_at_1"].value, values["scan_recall_at_1"].low) == (1, 0)
    assert values["scan_recall_at_5"].low > 0.7
    assert values["scan_average_precision"].value == pytest.approx(1)


def test_what_a_scanner_gets_does_not_tell_a_poisoned_row(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Row] = []
    monkeypatch.setattr(
        type(build("scanners", "lift")),
        "scan",
        lambda self, rows, test=(): (seen.append(row) or NOTHING for row in rows),
    )
    row = replace(ROWS[0], label="yes", fields={"bad": "1"}, better=("So.",), worse=("Bad.",))
    build("defenses", "scan").facts([row], frozenset())
    assert [*seen, *Bare([row])] == [ROWS[0], replace(ROWS[0], worse=("Bad.",))]
    only_bad = replace(row, answer="")
    assert as_learned(only_bad, rejected=True) == replace(ROWS[0], answer="Bad.")


def test_without_an_attack_there_are_only_false_alarms() -> None:
    facts = build("defenses", "scan").facts(free(500), frozenset())
    [value] = build("metrics", "scan").measure(Evidence(training=facts))
    assert (value.metric, value.value, value.n) == ("clean_flag_rate", 0, 500)


def test_a_defense_that_leaves_no_row_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    cell = Experiment.make({"data": "sandbox-reviews", "defense": ["deduplicate"]})
    monkeypatch.setattr(type(cell.acting[0]), "filter", lambda *args: [])
    with pytest.raises(CellError, match="'deduplicate' removes every training row"):
        filtered(cell, Context(Store(tmp_path), Machine(device="cpu")))
