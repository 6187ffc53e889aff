"""The log of a run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from backfire import plan
from backfire.launch import progress
from backfire.launch.log import Event, JsonLines, Log
from backfire.launch.progress import ProgressDisplay, titles
from backfire.plan import Job
from backfire.progress import Facts, Pace, facts, within
from backfire.recipe import load


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    recipe = load("tour", edits=["seed=0"])
    return plan.jobs(recipe.cells, recipe.axes)


class Written:
    """A log with a clock of its own, and what it wrote."""

    def __init__(self) -> None:
        self.events, self.now = list[Event](), 0.0
        self.log = Log(self.events.append, lambda: self.now)

    @property
    def lines(self) -> list[str]:
        return [event.line() for event in self.events if event.event != "start"]


def test_a_log_has_a_line_per_tenth_and_a_minute(jobs: list[Job]) -> None:
    one, two, three = jobs[:3]
    w = Written()
    for step in range(1, 201):
        w.now += 2
        w.log.at(one, "train x", f"training, loss {step}.5, 8 rows/s", step, 200)
    assert len(w.lines) == 10
    assert w.lines[0] == (
        "train x: training, 10% (20 of 200), loss 20.500, 8 rows/s, 6 min left, 38 s"
    )
    assert w.lines[-1] == "train x: training, 100% (200 of 200), loss 200.500, 8 rows/s, 7 min"
    w.now += 59
    w.log.remind()
    assert len(w.lines) == 10
    w.now += 1
    w.log.at(two, "cell y", "model", 0, 1)
    w.log.remind()
    assert len(w.lines) == 11 and w.lines[10].startswith("train x: training, 100% (200 of 200)")
    w.now += 60
    w.log.remind()
    assert w.lines[12] == "cell y: model, 60 s"
    w.log.ended(one, "train x", "ok")
    w.now += 600
    w.log.remind()
    assert w.lines[13:] == ["train x: ok", "cell y: model, 11 min"]
    w.log.ended(two, "cell y", "oom")
    before = len(w.lines)
    for part in ("first", "second"):  # two parts of a job, each with its own count
        for done in range(10):
            w.now += 5
            w.log.at(three, "cell z", f"{part}: evaluation", done + 1, 10)
    lines = w.lines[before:]
    assert len(lines) == 19, "the first call is the start, which is no line for people"
    assert lines[8] == "cell z: first: evaluation, 100% (10 of 10), 45 s"
    assert lines[9] == "cell z: second: evaluation, 10% (1 of 10), 50 s"
    assert lines[10] == "cell z: second: evaluation, 20% (2 of 10), 40 s left, 55 s"


def test_the_time_left_is_at_the_pace_since_this_start(jobs: list[Job]) -> None:
    w = Written()
    w.log.at(jobs[0], "x", "training", 900, 1000)  # continued from a checkpoint
    w.now = 10.0
    w.log.at(jobs[0], "x", "training", 910, 1000)
    w.now = 70.0
    w.log.remind()
    assert [event.seconds_left for event in w.events] == [None, 90 * 10 / 10, 90 * 70 / 10]


@pytest.mark.parametrize(
    ("rows", "seconds", "rate"), [(8, 100, "0.08"), (8, 2, "4"), (90, 8, "11"), (25000, 2, "12500")]
)
def test_a_text_is_read_as_it_was_written(rows: int, seconds: float, rate: str) -> None:
    now = [5.0]
    pace = Pace(16, lambda: now[0])
    assert pace.text("training", 16) == "training"
    now[0] += seconds
    text = pace.text("training", 16 + rows, 0.51239)
    assert text == f"training, loss 0.512, {rate} rows/s"
    assert facts(text) == Facts("training", 0.512, float(rate))
    assert facts(f"{text} on node-7.cluster") == Facts(
        "training on node-7.cluster", 0.512, float(rate)
    )
    shown = list[str]()
    within("part 1 of 2 (tuned, clean)", lambda *at: shown.append(at[2]))(1, 2, text)
    assert facts(shown[0]) == Facts("part 1 of 2 (tuned, clean): training", 0.512, float(rate))


def test_a_loss_is_read_from_the_device_only_now_and_then() -> None:
    now, reads = [0.0], list[float]()

    class Loss:
        def __float__(self) -> float:
            reads.append(now[0])
            return now[0]

    pace = Pace(clock=lambda: now[0])
    texts = []
    for _ in range(100):
        texts.append(pace.text("training", 0, Loss()))
        now[0] += 0.01
    assert len(reads) in (5, 6)
    read = [facts(text).loss for text in texts]
    assert all(loss is not None and at / 100 - loss < 0.21 for at, loss in enumerate(read))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model",
        "waiting for stage",
        "running on node",
        "The checkpoint in /a, b is of another run; ignoring it.",
        "a\nb, loss x",
        "no checkpoint, loss of all",
    ],
)
def test_a_text_without_numbers_is_an_activity(text: str) -> None:
    assert facts(text) == Facts(text, None, None)


def test_a_log_for_machines_is_one_object_a_line(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", JsonLines(stream))
    console, job = Console(stderr=True), jobs[-1]
    with ProgressDisplay(console, jobs) as display:
        display.log.clock = iter(range(100)).__next__  # type: ignore[assignment]
        console.print("A note.\nAnd \x1b[31manother " + "long " * 40, soft_wrap=True)
        display.watch(job, "training", 0, 4)
        display.watch(job, "training, loss 1.250, 3 rows/s", 2, 4)
        display.watch(job, "oom", 1, 1)
    note, more, start, middle, end = map(json.loads, stream.getvalue().splitlines())
    assert note["event"] == "note" and note["text"] == "A note."
    assert more["text"].startswith("And another long") and len(more["text"]) > 200
    assert all(datetime.fromisoformat(entry["time"]).tzinfo for entry in (note, start, end))
    assert {k: start[k] for k in ("event", "job", "kind", "title", "activity", "done")} == {
        "event": "start",
        "job": job.id,
        "kind": "cell",
        "title": display.titles[job.id],
        "activity": "training",
        "done": 0,
    }
    names = ("event", "done", "total", "loss", "rows_per_second", "seconds_left", "seconds")
    assert [middle[k] for k in names] == ["progress", 2, 4, 1.25, 3.0, 1.0, 1.0]
    assert (end["event"], end["exit"], end["seconds"]) == ("end", "oom", 2.0)
    assert start.keys() == middle.keys() == end.keys(), "a value that is not known is null"


def test_errors_are_objects_too(backfire: Callable[..., Any]) -> None:
    for arguments in (("no-such-recipe",), ("tour", "--profile", "no"), ("tour", "no=1")):
        done = backfire("run", "--log-format", "json", *arguments)
        [entry] = map(json.loads, done.err.splitlines())
        assert (done.code, entry["event"]) == (2, "note")
        assert entry["text"].startswith("backfire: ")
    assert "backfire: " in backfire("run", "no-such-recipe").err.splitlines()[0]


def test_titles_number_the_jobs_and_tell_equal_names_apart() -> None:
    edits = [
        "matrix={method: [{name: lora, learning_rate: 5e-4}, {name: lora, learning_rate: 1e-3}]}",
        "include=[]",
        "attack.rate=0.05",
    ]
    recipe = load("backdoor-tweets", edits=edits)
    named = list(titles(plan.jobs(recipe.cells, recipe.axes)).values())
    slug = "sandbox-reviews-badnets-0.05-lora-s0"
    assert f"cell 1/2 {slug} (method=lora, learning_rate 0.0005)" in named
    assert f"train 1/4 {slug} (method=lora, learning_rate 0.0005)" in named
    assert len({*named}) == len(named)


def _swept(*triggers: str) -> list[Job]:
    edits = [f"matrix={json.dumps({'attack.trigger': triggers})}", "include=[]"]
    recipe = load("backdoor-tweets", edits=edits)
    return plan.jobs(recipe.cells, recipe.axes)


def test_a_title_is_text_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    jobs = _swept("[/b] \x1b[2J", "[red]\nb")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    display = ProgressDisplay(console, jobs)
    with display:
        display.watch(jobs[-1], "waiting for [/i] on node", 0, 1)
        display.progress.refresh()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(attack.trigger=[red] b)" in shown and "waiting for [/i] on node" in shown
    named = "".join(display.titles.values())
    assert "attack.trigger=[/b] )" in named and "\x1b" not in named


def test_titles_of_many_cells_are_read_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(count: int) -> int:
        jobs, calls = _swept(*(f"t{number}" for number in range(count))), list[object]()
        monkeypatch.setattr(progress, "_short", lambda value: calls.append(value) or "x")
        titles(jobs)
        return len(calls)

    assert work(40) == 2 * work(20)


def test_a_loss_that_is_not_finite_is_null() -> None:
    for loss in ("nan", "inf", "-inf"):
        text = Pace().text("training", 0, float(loss))
        assert facts(text) == Facts("training", None, None)
