"""The log of a run."""

from __future__ import annotations

from backfire import plan
from backfire.launch.progress import Log, titles
from backfire.recipe import load


def test_a_log_has_a_line_per_tenth_and_a_minute() -> None:
    lines, now = list[str](), [0.0]
    log = Log(lines.append, lambda: now[0])
    for step in range(1, 201):
        now[0] += 2
        log.at("a", "train x", f"loss {step}", step, 200)
    assert len(lines) == 10
    assert lines[0] == "train x: 10% (20 of 200), loss 20, 38 s"
    now[0] += 59
    log.remind()
    assert len(lines) == 10
    now[0] += 1
    log.at("b", "cell y", "model", 0, 1)
    log.remind()
    assert lines[10:] == ["train x: 100% (200 of 200), loss 200, 458 s"]
    now[0] += 60
    log.remind()
    assert lines[12] == "cell y: model, 60 s"
    log.ended("a", "train x", "ok")
    now[0] += 600
    log.remind()
    assert lines[13:] == ["train x: ok", "cell y: model, 660 s"]
    for place in (*range(10), *range(10)):  # two parts of a job, each with its own count
        now[0] += 5
        log.at("c", "cell z", "replies", place + 1, 10)
    assert len(lines) == 15 + 19, "the first call is the start, which is not logged"


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
