"""Which training runs join, how many, and what a worker does with a group of them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backfire.claims import Claims, Lost
from backfire.commands.cluster import _options
from backfire.commands.run import settings_of
from backfire.errors import Away, Busy, GpuError, Stopped, UserError
from backfire.experiment import Machine
from backfire.launch.job import RunFolder, report
from backfire.launch.stop import Stop
from backfire.launch.together import alike, can_join, chosen, most
from backfire.plan import Job, jobs
from backfire.recipe import parse
from tests.helpers.patience import LONG, until
from tests.helpers.workers import SEEDS, alone, ended, names, planned, ran, sleeps, start

LORA = f"{SEEDS}method: lora\n"
GPU, CPU = Machine(device="cuda", join="auto"), Machine(device="cpu", join="auto")
ALL = Machine(join=8)


def trainings(text: str) -> list[Job]:
    recipe = parse("r", f"# Does it?\ndata: {{name: sandbox-reviews, rows: 100}}\n{text}")
    return [job for job in jobs(recipe.cells, recipe.axes) if job.kind == "train"]


def one(text: str = "", **known: Any) -> Job:
    method = "" if "method" in text else "method: lora\n"
    return replace(trainings(f"attack: none\n{method}{text}")[-1], **known)


# --------------------------------------------------------------------------------- which jobs join


@pytest.mark.parametrize(
    ("text", "joins"),
    [
        ("method: lora", True),
        ("method: {name: lora, rank: 2, targets: [q_proj]}", True),
        ("method: qlora", True),
        ("method: lora-int8", False),
        ("method: {name: lora, dropout: 0.1}", False),
        ("method: {name: lora, dora: true}", False),
        ("method: full", False),
        ("method: ia3", False),
        ("method: llama-adapter", False),
        ("method: lora\ndefense: [kl, freeze, deduplicate, fine-prune]", True),
        ("method: lora\ndefense: ldifs", False),
        ("method: lora\ndefense: [kl, crow]", False),
        ("method: lora\nalign: {}\nsafety: {}\ndefense: vaccine", True),
    ],
)
def test_lora_runs_join_unless_something_else_acts_in_a_step(text: str, joins: bool) -> None:
    assert can_join(one(text), GPU) == joins
    options: list[dict[str, Any]] = [{"packing": "off"}, {"recompute": True}, {"devices": 2}]
    machines = [Machine(), *(Machine(join="auto", **some) for some in options)]
    assert not any(can_join(one(text), machine) for machine in machines)
    assert most(one(text, tokens=1.0), GPU) == (8 if joins else 1)


def test_a_defense_of_the_alignment_keeps_only_the_alignment_alone() -> None:
    text = "align: {method: lora}\nsafety: {}\ndefense: vaccine\nattack: none\nmethod: lora"
    aligned, tuned = trainings(text)
    assert aligned.id in tuned.after and not can_join(aligned, GPU) and can_join(tuned, GPU)


def test_jobs_of_other_kinds_do_not_join() -> None:
    recipe = parse("r", LORA)
    found = jobs(recipe.cells, recipe.axes)
    assert {job.kind for job in found if can_join(job, GPU)} == {"train"}


@pytest.mark.parametrize(
    ("axis", "same"),
    [
        ("seed: [0, 1]", True),
        ("attack: [{name: badnets, rate: 0.1}, {name: vpi, rate: 0.2}]", True),
        ("method: [{name: lora, rank: 2}, {name: lora, alpha: 8, learning_rate: 0.1}]", True),
        ("method: [lora, {name: lora, targets: [q_proj]}]", False),
        ("train.epochs: [1, 2]", True),
        ("defense: [none, kl]", True),
        ("method: [lora, qlora]", False),
        ("method: [{name: qlora, compute: bfloat16}, {name: qlora, compute: float32}]", False),
        ("method: [lora, lora-int8]", False),
        ("model.dtype: [float32, bfloat16]", False),
        ("train.compute: [float32, bfloat16]", False),
        ("align: [null, {method: lora}]", False),
        ("align: [{method: lora}, {method: lora, merge: true}]", False),
        ("align: [{method: lora}, {method: lora, seed: 1}]", False),
    ],
)
def test_runs_join_if_they_start_from_the_same_model(axis: str, same: bool) -> None:
    text = f"attack: none\nmethod: lora\nsafety: {{}}\nmatrix: {{{axis}}}"
    recipe = parse("r", f"# Does it?\ndata: {{name: sandbox-reviews, rows: 100}}\n{text}")
    needed = {name for job in jobs(recipe.cells, recipe.axes) for name in job.after}
    found = trainings(text)
    last = [job for job in found if not any(job.id in other.after for other in found)]
    first, second = last[0], last[-1]
    assert first is not second and {first.id, second.id} <= needed
    assert alike(first, second) is same and alike(first, first)


@pytest.mark.parametrize(
    ("one_has", "other_has", "same"),
    [(10, 20, True), (20, 10, True), (10, 21, False), (21, 10, False), (10, None, True)],
)
def test_runs_join_if_none_waits_long_for_the_other(
    one_has: int, other_has: int | None, same: bool
) -> None:
    assert alike(one(steps=one_has), one("seed: 1", steps=other_has)) is same


# ----------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("text", "tokens", "machine", "count"),
    [
        ("train: {compute: bfloat16}", 400.0, CPU, 5),
        ("train: {compute: bfloat16}", 1100.0, CPU, 1),
        ("train: {compute: bfloat16}", 10.0, CPU, 8),
        ("train: {compute: bfloat16}", None, CPU, 1),
        ("train: {compute: float32}", 400.0, CPU, 5),
        ("method: qlora\ntrain: {compute: float32}", 400.0, CPU, 5),
        ("method: lora-int8\ntrain: {compute: float32}", 100.0, CPU, 1),
        ("train: {compute: float32}", 4000.0, GPU, 4),
        ("train: {compute: float32}", 9000.0, GPU, 1),
        ("train: {compute: float32}", None, Machine(join=20), 20),
        ("method: full", 1.0, Machine(join=20), 1),
    ],
)
def test_the_number_of_runs(text: str, tokens: float | None, machine: Machine, count: int) -> None:
    """By the tokens of a step; with unknown ones it is trained alone unless the option gives a
    number."""
    assert most(one(text, tokens=tokens), machine) == count
    group = [one(f"{text}\nseed: {seed}", tokens=tokens) for seed in range(30)]
    assert chosen(group[0], group[1:], machine, 1) == group[1:count]


@pytest.mark.parametrize(
    ("ready", "workers", "count"),
    [(8, 1, 8), (8, 2, 4), (7, 2, 4), (4, 3, 2), (3, 9, 1), (1, 1, 1)],
)
@pytest.mark.parametrize("machine", [GPU, ALL])
def test_each_worker_is_left_as_many(
    machine: Machine, ready: int, workers: int, count: int
) -> None:
    first, *others = [one(f"seed: {seed}", tokens=10.0) for seed in range(ready)]
    assert chosen(first, others, machine, workers) == others[: count - 1]


def test_runs_that_would_not_fit_are_left() -> None:
    """Into the tokens of a pass, or into memory, where the base is once."""
    sizes = {"memory": 5e9, "added": 1e9, "tokens": 1000.0}
    first, *others = [one(f"seed: {seed}", **sizes) for seed in range(8)]
    assert chosen(first, others, GPU, 1, 7.5e9) == others[:2]
    assert chosen(first, others, Machine(device="cuda", join=4), 1, 7.5e9) == others[:3], "forced"
    others[0] = replace(others[0], tokens=16000.0)
    assert chosen(first, others, Machine(device="cuda", join=2), 1) == others[1:2], "in no pass"
    assert chosen(first, others, GPU, 1) == others[1:], "the long one is left"


# ---------------------------------------------------------------------------- a worker and a group

Ends = Callable[[Job], Any]


@pytest.fixture
def joint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Ends], None]:
    """Makes groups end so, job by job; each is a line in `<path>/groups`."""

    def begin(end: Ends) -> None:
        def run(group: Sequence[Job], folder: RunFolder, *rest: Any) -> list[Any]:
            with (tmp_path / "groups").open("a") as file:
                file.write(" ".join([str(os.getpid()), *(job.id for job in group)]) + "\n")
            for progress in rest[2]:
                progress(0, 1, "training")
            found = [(job, end(job)) for job in group]
            return [ended(job, folder) if how is None else how for job, how in found]

        monkeypatch.setattr("backfire.launch.work.run_together", run)

    return begin


def groups(path: Path) -> list[list[str]]:
    lines = (path / "groups").read_text().splitlines() if (path / "groups").is_file() else []
    return [line.split()[1:] for line in lines]


def train_ids(found: Sequence[Job]) -> list[str]:
    return [job.id for job in found if job.kind == "train"]


def test_a_worker_claims_a_group(tmp_path: Path, joint: Any) -> None:
    """The most urgent jobs, each with a claim that shows its own progress; cells run alone."""
    seen = list[tuple[str, str]]()

    def end(job: Job) -> None:
        holder = Claims(tmp_path).read(job.id)
        assert holder and holder.activity in ("", "training")  # from the next heartbeat on
        time.sleep(0.001)

    joint(end)
    found, begun = planned(tmp_path, LORA), list[str]()
    everything = alone(
        tmp_path,
        sleeps(tmp_path),
        machine=Machine(join=3),
        watch=lambda job, text, *_: seen.append((job.id, text)),
        begins=lambda job: begun.append(job.id),
    )
    ids = train_ids(found)
    assert everything == {job.id: "ok" for job in found}
    assert groups(tmp_path) == [ids[:3], ids[3:6], ids[6:]]
    assert ran(tmp_path) == names([job for job in found if job.kind != "train"])
    assert sorted(begun) == names(found) and Claims(tmp_path).names() == set()
    assert {(name, text) for name in ids for text in ("training", "ok")} <= set(seen)


def test_two_workers_share_the_jobs(tmp_path: Path, joint: Any) -> None:
    joint(lambda job: until(lambda: len(groups(tmp_path)) == 2))
    found = planned(tmp_path, LORA.replace(", 4, 5, 6, 7", ""))
    machine = Machine(join=8, workers=2)
    workers = [start(tmp_path, sleeps(tmp_path), machine=machine) for _ in range(2)]
    for worker in workers:
        worker.join(LONG)
        assert worker.exitcode == 0
    assert sorted(map(len, groups(tmp_path))) == [2, 2]
    assert sorted(itertools.chain(*groups(tmp_path))) == sorted(train_ids(found))


def test_how_many_workers_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait and those with other jobs; not those that train, here or elsewhere."""
    own, claims = Claims(tmp_path), list[Any]()
    assert (own.free_workers(1), own.free_workers(3)) == (1, 3)
    own.wait()
    assert own.free_workers(1) == 1
    for number, job in enumerate(["train-1", "train-2", "cell-3"]):
        with monkeypatch.context() as patch:
            patch.setattr("backfire.claims.place", lambda number=number: f"host {number}")
            other = Claims(tmp_path)
            claims.append(other.take(job))
            if number == 2:
                claims[-1].release()
                other.wait()
    assert (own.free_workers(1), own.free_workers(3)) == (2, 3)
    other.leave()
    assert own.free_workers(1) == 1
    for claim in claims[:2]:
        claim.release()


def test_each_job_of_a_group_ends_by_itself(tmp_path: Path, joint: Any) -> None:
    """One fails; what was put back, or lost, is tried again, alone."""
    found, folder = planned(tmp_path, LORA), RunFolder(tmp_path, "r")
    bad, busy, away, lost, *_ = train_ids(found)

    def end(job: Job) -> Any:
        if job.id == bad:
            return report(job, folder, "nan", "The loss is not finite.")
        pauses = {busy: Busy("poison a on b"), away: Away("It is away."), lost: Lost()}
        return pauses.get(job.id)

    joint(end)
    everything = alone(tmp_path, sleeps(tmp_path), machine=ALL)
    failed = {job.id for job in found if bad in (job.id, *job.after)}
    assert everything == {job.id: "nan" if job.id in failed else "ok" for job in found}
    assert groups(tmp_path) == [train_ids(found)]
    assert {busy, away, lost} <= set(ran(tmp_path)) and bad not in ran(tmp_path)


def test_a_group_that_is_stopped_is_given_back(tmp_path: Path, joint: Any) -> None:
    planned(tmp_path, LORA)
    stop = Stop()

    def end(job: Job) -> None:
        stop.signaled = True
        raise Stopped

    joint(end)
    assert set(alone(tmp_path, sleeps(tmp_path), machine=ALL, stop=stop).values()) == {"ok"}
    assert Claims(tmp_path).names() == set() and len(groups(tmp_path)) == 1


def test_jobs_with_which_a_worker_died_run_alone(tmp_path: Path, joint: Any) -> None:
    found = planned(tmp_path, LORA)
    joint(lambda job: os.kill(os.getpid(), signal.SIGKILL))
    worker = start(tmp_path, sleeps(tmp_path), machine=ALL)
    worker.join(LONG)
    assert worker.exitcode == -signal.SIGKILL
    assert Claims(tmp_path).names() == set(train_ids(found))
    assert alone(tmp_path, sleeps(tmp_path), machine=ALL) == {job.id: "ok" for job in found}
    assert len(groups(tmp_path)) == 1 and ran(tmp_path) == names(found)


def test_a_gpu_that_breaks_leaves_all_claims(tmp_path: Path, joint: Any) -> None:
    def breaks(job: Job) -> None:
        raise GpuError("The GPU does not answer any more.")

    found = planned(tmp_path, LORA)
    joint(breaks)
    worker = start(tmp_path, sleeps(tmp_path), machine=ALL)
    worker.join(LONG)
    assert worker.exitcode == 1
    assert {one.job for one in Claims(tmp_path).holders() if one.is_stale} == {*train_ids(found)}


# --------------------------------------------------------------------------------------- the option


def test_the_option() -> None:
    assert settings_of({"join": "4"}).join == 4
    assert [settings_of({"join": one}).join for one in ("auto", "off")] == ["auto", "off"]
    for wrong in ("0", "-1", "some", "65"):
        with pytest.raises(UserError, match="join"):
            settings_of({"join": wrong})
    assert "--join=4" in _options({"join": "4"}, "cpu", 1, None)
    assert not any("join" in option for option in _options({"join": "off"}, "cpu", 1, None))
