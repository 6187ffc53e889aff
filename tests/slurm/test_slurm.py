"""Twelve cells through a real Slurm whose workers are killed: by submitit, and by an array."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.clusters import Trouble, Twelve
from tests.helpers.snippets import snippet
from tests.slurm.cluster import Slurm, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = ("run", "twelve.yaml", "--out", "out", "--on", "slurm", "--partition", "debug")
SIZE = ("--mem", "1500M", "--time", "30")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny: Path, slurm: Slurm) -> Twelve:
    """The cells, run on this machine alone."""
    run = Twelve(tmp_path_factory.mktemp("local") / "run", tiny)
    run.run("--workers", "1")
    return run


@pytest.fixture
def twelve(tmp_path: Path, tiny: Path, slurm: Slurm) -> Iterator[Twelve]:
    run = Twelve(tmp_path / "run", tiny, slurm.environment)
    yield run
    run.end()


def test_all_cells_are_done_once_though_workers_are_killed_and_a_node_is_lost(
    twelve: Twelve, local: Twelve, slurm: Slurm
) -> None:
    begun = time.monotonic()
    trouble = Trouble(twelve, events={3: lambda: slurm.lose_node("n2")})
    watcher = twelve.start(*RUN, *SIZE, "--jobs", "3")
    try:
        trouble.until(lambda: watcher.poll() is not None)
    finally:
        watcher.kill()
        slurm.start_node("n2")
    assert watcher.returncode == 0, twelve.log()
    assert len(twelve.values()) == 12
    assert twelve.values() == local.values()
    print(f"\nsubmitit: {time.monotonic() - begun:.0f} s, {trouble.says()}")
    wait_until(lambda: slurm.command("squeue", "--noheader") == "")


def test_the_array_of_the_docs_does_all_cells_once_though_workers_are_killed(
    twelve: Twelve, local: Twelve, slurm: Slurm
) -> None:
    begun, rounds = time.monotonic(), 0
    script = snippet("cluster.md", "#SBATCH --array")
    for old, new in (("--gpus-per-node=1", "--nodes=1"), ("16G", "1500M"), ("runs/study", "out")):
        assert old in script
        script = script.replace(old, new)
    (twelve.root / "work.sh").write_text(script.replace("backfire work", _work(twelve)))
    assert twelve.start("plan", "twelve.yaml", "--out", "out").wait() == 0, twelve.log()
    trouble = Trouble(twelve, events={3: lambda: slurm.lose_node("n2")})

    def over() -> bool:
        """Whether nothing is left; while something is, the script is submitted again."""
        nonlocal rounds
        if len(twelve.values()) == 12:
            return slurm.command("squeue", "--noheader") == ""
        if slurm.command("squeue", "--noheader") == "":
            rounds += 1
            place = f"--chdir={twelve.root}"
            slurm.command("sbatch", "--array=0-2", "--cpus-per-task=1", place, _script(twelve))
        return False

    try:
        trouble.until(over)
    finally:
        slurm.start_node("n2")
    assert twelve.values() == local.values()
    print(f"\narray: {time.monotonic() - begun:.0f} s, {rounds} rounds, {trouble.says()}")


def _work(twelve: Twelve) -> str:
    cache = f"BACKFIRE_CACHE={twelve.variables()['BACKFIRE_CACHE']}"
    return " ".join(["env", cache, *twelve.command("work"), "--workers=1"])


def _script(twelve: Twelve) -> str:
    return str(twelve.root / "work.sh")


def test_slurm_and_this_machine_share_one_run_folder(
    twelve: Twelve, local: Twelve, slurm: Slurm
) -> None:
    """Both commands plan the run, at about the same time."""
    begun, trouble = time.monotonic(), Trouble(twelve, kills=0)
    far = twelve.start(*RUN, *SIZE, "--jobs", "1")
    near = twelve.start(*RUN[:4], "--workers", "1")
    trouble.until(lambda: far.poll() is not None and near.poll() is not None)
    assert (far.returncode, near.returncode) == (0, 0), twelve.log()
    assert twelve.values() == local.values() and trouble.num_workers() == 2
    print(f"\nSlurm and local: {time.monotonic() - begun:.0f} s, {trouble.says()}")
    wait_until(lambda: slurm.command("squeue", "--noheader") == "")


def test_ctrl_c_leaves_the_worker_and_the_same_command_starts_no_other(
    twelve: Twelve, local: Twelve, slurm: Slurm
) -> None:
    first = twelve.start(*RUN, *SIZE, "--jobs", "1")
    while not (found := twelve.claims()):
        time.sleep(0.1)
    os.kill(found[0]["pid"], signal.SIGSTOP)  # or it is done before the second command asks
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=30) == 130
    assert "Interrupted. The workers go on." in twelve.log()
    (number,) = slurm.command("squeue", "--noheader", "--format=%i").split()
    second = twelve.start(*RUN, *SIZE, "--jobs", "1")
    wait_until(lambda: "1 worker of this run is in Slurm." in twelve.log())
    os.kill(found[0]["pid"], signal.SIGCONT)
    # Its time is over: it saves a checkpoint, and is queued again.
    slurm.command("scancel", "--signal=USR1", number)
    wait_until(lambda: "PENDING" in slurm.command("squeue", "-h", "-j", number, "-o", "%T"))
    assert twelve.claims() == []
    assert second.wait(timeout=300) == 0, twelve.log()
    assert {file.name for file in twelve.out.glob("workers/slurm-*.log")} == {f"slurm-{number}.log"}
    assert twelve.values() == local.values()
    wait_until(lambda: slurm.command("squeue", "--noheader") == "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--partition", "nowhere"], "Slurm does not take the job: Invalid partition name"),
        (["--mem", "900G"], "Slurm does not take the job: .* not available"),
        (["--gpus", "1"], "Slurm does not take the job: Invalid generic resource"),
        (["--sbatch", "constraint=a100"], "Slurm does not take the job: Invalid feature"),
        (["--sbatch", "color=red"], "Slurm does not take the job: unrecognized option"),
        (["--mem", "100M"], r"jobs? of 25 would not fit into --mem 100M: the largest needs"),
        (["--time", "soon"], "--time soon is no time"),
        (["--mem", "much"], "--mem much is no amount of memory"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_anything_is_written(
    twelve: Twelve, options: list[str], sentence: str
) -> None:
    process = twelve.start(*RUN[:6], *options)
    assert process.wait(timeout=300) == 2
    assert re.search(sentence, twelve.log()), twelve.log()
    assert not twelve.out.exists()


def test_workers_that_would_wait_for_ever_are_refused(twelve: Twelve, slurm: Slurm) -> None:
    process = twelve.start(*RUN[:-1], "short", "--mem", "1500M", "--time", "60")
    assert process.wait(timeout=300) == 2
    assert "PartitionTimeLimit" in twelve.log() or "time limit" in twelve.log()
    wait_until(lambda: slurm.command("squeue", "--noheader") == "")


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can hide a folder from a node.")
def test_a_cache_that_the_nodes_do_not_share_is_named(twelve: Twelve, slurm: Slurm) -> None:
    with slurm.nodes_without(twelve.root / "cache"):
        process = twelve.start(*RUN, *SIZE, "--jobs", "2")
        assert process.wait(timeout=300) == 2
    assert f"The cache {twelve.root}/cache is not shared with" in twelve.log()
    assert not twelve.out.exists()
    wait_until(lambda: slurm.command("squeue", "--noheader") == "")


def test_a_slurm_that_is_down_is_named(twelve: Twelve, slurm: Slurm) -> None:
    conf = (slurm.root / "slurm.conf").read_text()
    port = next(line for line in conf.splitlines() if line.startswith("SlurmctldPort"))
    (twelve.root / "slurm.conf").write_text(conf.replace(port, "SlurmctldPort=9"))
    twelve.environment = {**slurm.environment, "SLURM_CONF": str(twelve.root / "slurm.conf")}
    process = twelve.start(*RUN, *SIZE)
    assert process.wait(timeout=300) == 2
    assert "Unable to contact slurm controller" in twelve.log()
    assert not twelve.out.exists()
