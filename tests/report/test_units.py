"""A number is shown in the unit that its metric gives it, whatever its name."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from backfire.base import Evidence, Metric, Unit, Value
from backfire.report.page import render
from backfire.result import FORMAT
from backfire.results.groups import headlines
from backfire.results.load import records, summary
from backfire.results.terminal import print_summary
from tests.helpers.fake_run import value, write_cell


class GeneratedTokens(Metric):
    """A metric that the report does not know; its name contains `rate`."""

    name = "generated-tokens"

    def measure(self, evidence: Evidence) -> list[Value]:
        return [
            Value("generated_tokens", 25.0, 22.0, 28.0, 60, "none", "count"),
            Value("generated_tokens[de]", 12.5, 10.0, 15.0, 30, "none", "count"),
            Value("empty_replies", 0.25, 0.1, 0.5, 60, "lower", "share"),
            Value("generated_tokens_ceiling", 32.0, None, None, 1, "none", "count", "detail"),
            Value(
                "generated_tokens_floor", 20.0, 18.0, 21.0, 60, "none", "count", "floor",
                "generated_tokens",
            ),
        ]  # fmt: skip


def values_of(metric: Metric) -> list[Value]:
    return metric.values(Evidence())


def table(run: Path) -> str:
    out = io.StringIO()
    print_summary(summary(run), Console(file=out, width=300))
    return out.getvalue()


def test_a_new_metric_is_shown_rightly_without_touching_the_report(tmp_path: Path) -> None:
    run, values = tmp_path / "r", values_of(GeneratedTokens())
    assert {v.family for v in values} == {"generated-tokens"}
    assert [v.role for v in values] == ["headline", "headline", "companion", "detail", "floor"]
    for seed in range(2):
        write_cell(run, values=[asdict(v) for v in values], format=FORMAT, seed=seed)
    assert headlines(summary(run)) == ["generated_tokens", "empty_replies"]
    shown, page = table(run), render(run)
    assert "25 [22, 28]" in shown and "baseline 20" in shown and "25.0 % [10.0, 50.0]" in shown
    assert "ceiling" not in shown and "generated tokens ceiling" in page
    assert ">25<" in page and "2500" not in page
    units = {record["metric"]: record["unit"] for record in records(run)}
    assert units["generated_tokens"] == "count" and units["empty_replies"] == "share"


def test_one_metric_may_have_several_units(tmp_path: Path) -> None:
    """Of older files too, which name none."""
    old = [value("truthfulness", 0.25), value("truthfulness[MC1]", 0.25)]
    old += [value("parity[merged: flips]", 0.25), value("parity[merged: accuracy change]", -0.25)]
    old += [value("generated_tokens", 25.0), value("published_attack", 0.25)]
    write_cell(tmp_path / "r", values=old)
    stats = summary(tmp_path / "r")[0].stats
    assert {metric: stat.number() for metric, stat in stats.items()} == {
        "truthfulness": "0.250",
        "truthfulness[MC1]": "25.0 %",
        "parity[merged: flips]": "25.0 %",
        "parity[merged: accuracy change]": "-25.0 points",
        "generated_tokens": "25",
        "published_attack": "25.0 %",
    }


def test_bounds_come_from_the_unit_and_the_metric() -> None:
    wanted: dict[Unit, tuple[float, float]] = {"share": (0, 1), "score": (0, 1), "bits": (0, 13)}
    for unit, limits in wanted.items():
        most = 13.0 if unit == "bits" else None
        assert Value("x", 0.5, 0, 1, 9, "none", unit, most=most).limits == limits
        assert Value("x", 0.5, 0, 1, 9, "none", unit, "change").limits[0] == -float("inf")
