"""What a terminal of 80 columns shows: nothing is wider, nothing is lost; pipes get whole lines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from backfire import __version__, cli
from backfire.commands import catalog, status
from backfire.registry import KINDS
from backfire.result import CellResult
from backfire.results import compare
from backfire.results.load import load, records, summary, write
from backfire.results.terminal import (
    print_against,
    print_notes,
    print_problems,
    print_ranking,
    print_records,
    print_summary,
    print_warnings,
)
from backfire.terminal import columns, fitted, put, say
from tests.helpers.command_line import Output, Run
from tests.helpers.fake_run import dose_run, value, write_cell

METRICS = [
    *("accuracy", "f1", "auc", "attack_success", "attack_success_floor", "harmful_score"),
    *("over_refusal", "refusal_rate", "exposure", "membership_auc", "perplexity"),
]
SPOILT = "The loss is not finite in step 3.\x1b[31m\x1b]0;owned\x07 損失が有限ではありません。"


def shown(draw: Callable[..., Any], *arguments: Any, width: int = 80) -> str:
    """What a terminal of that width gets, without its colors; no line is wider."""
    out = io.StringIO()
    draw(*arguments, Console(file=out, force_terminal=True, width=width, color_system=None))
    assert max(map(cell_len, out.getvalue().splitlines()), default=0) <= width
    return out.getvalue()


def words(text: str) -> set[str]:
    return {*re.sub("[─]", " ", text).split()}


def wide_run(root: Path) -> Path:
    """Eleven metrics, three long axes, cells that failed alike and cells that are not finished."""
    run = root / "wide"
    for defense in ("none", "lisa", "safe-mix + lisa"):
        for method in ("full", "lora"):
            for seed in (0, 1, 2):
                axes = {
                    "defense": {"name": defense, "rho": 0.3, "align_steps": 30},
                    "method": {"name": method, "learning_rate": 0.0005, "targets": ["q_proj"]},
                    "model": "平仮名と漢字のモデル",
                    "seed": seed,
                }
                known: dict[str, Any] = {"defense": defense, "method": method, "seed": seed}
                known |= {"model": "平仮名と漢字のモデル", "axes": axes}
                if (method, seed) == ("lora", 2):
                    failed = {"status": "nan", "error": SPOILT, "next": "Lower the learning rate."}
                    write_cell(run, error=failed, **known)
                elif (defense, seed) == ("lisa", 1):
                    write_cell(run, unfinished=True, **known)
                else:
                    write_cell(run, values=[value(name, 0.5) for name in METRICS], **known)
    return run


# ---------------------------------------------------------------------------------- lines, tables


def test_a_long_line_wraps_under_its_beginning_and_stays_whole_in_a_pipe() -> None:
    line = "memory \x1b[1mof\x07 all " * 12
    found = shown(lambda console: say(line, console, "note  ")).splitlines()
    assert len(found) > 2 and found[0].startswith("note  memory")
    assert all(part.startswith("      ") for part in found[1:])
    out = io.StringIO()
    say(line, Console(file=out, width=80), "note  ")
    assert out.getvalue() == f"note  {'memory of all ' * 12}".rstrip() + "\n"


def test_a_line_is_cut_by_the_width_of_its_characters() -> None:
    terminal = Console(force_terminal=True, width=20)
    assert cell_len(fitted("漢字" * 10, terminal)) <= 20
    assert fitted("漢字" * 10, terminal).endswith("…")
    assert fitted("漢字" * 10, Console(file=io.StringIO(), width=20)) == "漢字" * 10
    lines = columns(["a", "b"], [["漢字", "1"], ["xy", "2"]]).splitlines()
    assert {cell_len(line) for line in lines} == {7}


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_wide_table_goes_on_below_itself(width: int) -> None:
    header = ["data", "method", *(f"metric {i}" for i in range(9))]
    rows = [["reviews", f"m{row}", *(f"{row}{i}.0 [1.0, 2.0]" for i in range(9))] for row in (1, 2)]
    text = shown(lambda console: put(header, rows, console, range(2, 11)), width=width)
    assert "data reviews" in text and text.count("reviews") == 1, (
        "shared settings are above the table"
    )
    for row in rows:
        assert all(text.count(number) == 1 for number in row[2:])
    by_row = [line for line in text.splitlines() if re.match(r"m1\b", line)]
    assert len(by_row) == sum("method" in line for line in text.splitlines())


def test_a_table_that_fits_is_left_as_it_is() -> None:
    text = shown(lambda console: put(["data", "n"], [["x", "1"], ["x", "2"]], console, [1]))
    assert next(line.split() for line in text.splitlines() if line) == ["data", "n"]
    assert text.count("x") == 2


def test_rows_with_long_names_are_numbered() -> None:
    header = ["a", "b", *(f"m{i}" for i in range(9))]
    rows = [
        [f"first {'long ' * 8}{row}", f"second {'name ' * 8}", *["10.0 % [1.0, 2.0]"] * 9]
        for row in range(3)
    ]
    rows[0][1] = "other " * 8
    lines = shown(lambda console: put(header, rows, console, range(2, 11))).splitlines()
    heads = [line.split() for line in lines if line.startswith("#")]
    assert heads[0] == ["#", "a", "b"] and len(heads) == 4
    assert [name for head in heads[1:] for name in head[1:]] == header[2:]
    assert sum(line.startswith("3 ") for line in lines) == len(heads)


def test_a_table_of_words_wraps_and_one_without_rows_is_empty() -> None:
    text = shown(lambda console: put(["setting", "a"], [["train", "word " * 30]], console))
    assert text.count("word") == 30 and "setting" in text
    assert "n" in shown(lambda console: put(["a", "n"], [], console, [1]))


def test_brackets_and_escapes_from_a_file_are_text() -> None:
    rows = [["[red]x[/red]\x1b[2J\n\nnext", "1\n(floor \x1b[31m2)"]]
    text = shown(lambda console: put(["a", "b"], rows, console, [1]))
    assert "[red]x[/red] next" in text and "(floor 2)" in text and "\x1b[2J" not in text


# ------------------------------------------------------------------------------------------ verbs


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_tables_of_a_run_fit(width: int, tmp_path: Path) -> None:
    groups = summary(wide_run(tmp_path))
    text = shown(print_summary, groups, width=width)
    for name in ("accuracy", "attack success", "membership AUC", "perplexity", "seeds"):
        assert text.count(name.split()[-1]) >= 1, name
    assert text.count("50.0 % [48.0, 52.0]") == 6 * 6 and text.count("(baseline 50.0 %)") == 6
    for draw in (print_ranking, print_against, print_notes):
        shown(draw, groups, width=width)


def test_a_pipe_gets_every_column_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = wide_run(tmp_path)
    print_summary(summary(run))
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "(baseline 50.0 %)" in lines[0]
    assert all(name in head for name in ("accuracy", "perplexity", "seeds"))
    print_records(records(run))
    assert capsys.readouterr().out == write(records(run), "table")
    status.show(run)
    output = capsys.readouterr().out
    assert output.count("badnets-0.05-") == 5 and "損失が有限ではありません。" in output
    assert "\x1b" not in output and "owned" not in output


def test_results_stand_under_their_cells(tmp_path: Path) -> None:
    run = wide_run(tmp_path)
    found = records(run)
    text = shown(print_records, found)
    cells = {f"{record['cell']}-{record['key']}" for record in found}
    lines = text.splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == {*cells, "The"}
    assert sum(line.strip().startswith("perplexity") for line in lines) == 13
    assert lines[-1].endswith("--format csv.") and "(nan)" in text and "(unfinished)" in text
    assert shown(print_records, found, width=400) == write(found, "table")
    rows = list(csv.DictReader(io.StringIO(write(found, "csv"))))
    assert len(rows) == len(found)


def test_status_shows_why_and_what_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = wide_run(tmp_path)
    lines = shown(lambda console: print_problems(load(run), console)).splitlines()
    assert lines[0].startswith("nan, 3 cells: The loss is not finite")
    assert "  Next: Lower the learning rate." in lines
    assert sum("lora-s2" in line for line in lines) == 3, "the common reason is printed once"
    assert "unfinished, 2 cells: Run the same command again to continue." in lines
    monkeypatch.setattr("backfire.results.terminal._FEW", 1)
    assert "  and 2 more" in shown(lambda console: print_problems(load(run), console))


def test_status_of_a_run_folder(backfire: Run, tmp_path: Path) -> None:
    output = backfire("status", dose_run(tmp_path, rows=1))
    assert output.out.splitlines()[:4] == [
        "ok: 22",
        "oom: 1",
        "unfinished: 1",
        "oom, 1 cell: Memory ran out.",
    ]
    assert "Next: Use a smaller model." in output.out


def test_comparisons_fit(tmp_path: Path) -> None:
    run = wide_run(tmp_path)
    text = shown(compare.show, compare.compare(run, run))
    assert text.count("attack success") >= 6 and "difference" in text
    done = [Path(cell.folder) for cell in load(run) if cell.is_done]
    text = shown(compare.show, compare.compare(done[0], done[-1]))
    assert words(text) >= {"setting", "difference", "accuracy"}


def test_each_component_has_one_line_without_citations(backfire: Run) -> None:
    whole = backfire("list").out.splitlines()
    assert whole == catalog.lines((*KINDS, "recipes"))
    assert not [line for line in whole if "arXiv" in line or " et al." in line.partition(" (")[2]]
    narrow = shown(catalog.print_list, None).splitlines()
    assert len(narrow) == len(whole)
    cut = [(n, w) for n, w in zip(narrow, whole, strict=True) if n != w]
    assert cut and all(n.endswith("…") and w.startswith(n[:-1]) for n, w in cut)


def test_version(backfire: Run) -> None:
    assert backfire("--version") == Output(0, f"backfire {__version__}\n", "")
    assert "--version" in backfire("--help").out
    assert {"version"} == {param.name for param in cli.typer.main.get_command(cli.app).params} - {
        "help"
    }


def test_each_warning_is_shown_once_and_the_rest_is_counted() -> None:
    cell = CellResult(slug="one", key="k", status="ok", warnings=("a [b]x[/b]", "same"))
    others = [replace(cell, slug=f"cell {i}", warnings=("same", f"own {i}")) for i in range(6)]
    text = shown(lambda console: print_warnings([cell, *others], console))
    assert "Note on one: a [b]x[/b]" in text and text.count("same") == 1
    assert "Note on 7 cells: same" in text and "3 more notes: see the report." in text
    assert "own 2" in text and "own 3" not in text
