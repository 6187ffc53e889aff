"""What is asked of Slurm and Ray, and what is refused before they are: neither is needed here."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backfire.commands.cluster import Asked, _about_time, _memory, _refuse_unshared
from backfire.commands.estimate import ASSUMED, Rows, Weights, evaluation_seconds
from backfire.errors import UserError
from backfire.launch import ray, remote, slurm
from backfire.launch.remote import Probe
from backfire.recipe import load
from backfire.registry import build
from tests.helpers.command_line import Run, tree
from tests.helpers.patience import until
from tests.helpers.workers import planned


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *[("90", 90), ("90:30", 91), ("4:00:00", 240), ("0:00:01", 1), ("2-12", 3600)],
        *[("1-0", 1440), ("1-12:30", 2190), ("1-12:30:00", 2190), (" 5 ", 5)],
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert slurm.minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0:00", "0-0", "soon", "-5", "1:2:3:4", "4h", "1.5"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no time"):
        slurm.minutes_of(text)


@pytest.mark.parametrize(
    ("text", "size"), [("16G", 2**34), ("16GB", 2**34), ("800", 800 * 2**20), ("1.5g", 3 * 2**29)]
)
def test_amounts_of_memory_are_read_as_sbatch_reads_them(text: str, size: int) -> None:
    assert slurm.memory_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "0G", "much", "-1G", "16X", "1e3"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no amount of memory"):
        slurm.memory_of(text)


def test_a_request_in_the_words_of_sbatch() -> None:
    others = {"constraint": "a100", "exclusive": True}
    wanted = slurm.Request(90, 2**30 + 1, gpus=2, partition="p", others=others)
    assert wanted.flags() == [
        *("--partition=p", "--gpus-per-node=2", "--time=90", "--cpus-per-task=1", "--mem=1025M"),
        *("--constraint=a100", "--exclusive"),
    ]
    assert wanted.parameters()["additional_parameters"] == {"requeue": True, **others}
    assert slurm.Request(1, 2**30).parameters()["signal_delay_s"] == 30  # half of its time


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--partition", "p"], "--partition is for --on slurm."),
        (["--on", "ray", "--time", "5"], "--time is for --on slurm."),
        (["--on", "slurm", "--ray-address", "a:1"], "--ray-address is for --on ray."),
        (["--on", "slurm", "--open-cluster"], "--open-cluster is for --on ray."),
        (["--gpus", "0"], "--gpus is for --on slurm and --on ray."),
        (["--jobs", "2"], "--jobs is for --on slurm and --on ray."),
    ],
)
def test_options_of_another_place_are_refused(
    options: list[str], sentence: str, backfire: Run
) -> None:
    found = backfire("run", "tour", *options)
    assert (found.code, found.err) == (2, f"backfire: {sentence}\n")


@pytest.mark.parametrize(
    ("place", "module", "sentence"),
    [
        ("slurm", "submitit", "--on slurm needs submitit: pip install 'backfire[slurm]'"),
        ("ray", "ray", "--on ray needs Ray: pip install 'backfire[ray]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    place: str,
    module: str,
    sentence: str,
    backfire: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    found = backfire("run", "tour", "--on", place)
    assert (found.code, found.err) == (2, f"backfire: {sentence}\n")
    assert tree(tmp_path) == {}


def test_a_machine_without_slurm_is_refused(
    backfire: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = backfire("run", "tour", "--on", "slurm")
    assert (found.code, "sbatch is not found" in found.err) == (2, True)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head", ":6379", "head:"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is no address of a Ray cluster"):
        ray._refuse_open(address, True)


@pytest.mark.parametrize("host", ["10.0.0.5", "head.example.org", "0.0.0.0", "[2001:db8::1]"])
def test_a_cluster_on_another_host_needs_a_token(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=r"may be open to everybody: .*RAY_AUTH_MODE=token"):
        ray._refuse_open(f"{host}:6379", False)
    ray._refuse_open(f"{host}:6379", True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_cluster_on_this_host_needs_none(host: str) -> None:
    ray._refuse_open(f"{host}:6379", False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_cluster_that_does_not_answer_is_named(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")
    with socket.socket() as taken:  # nobody listens on it
        taken.bind(("127.0.0.1", 0))
        address = f"{host}:{taken.getsockname()[1]}"
        ours = ray.Ray(tmp_path / "run", ray.Request(10**9, address=address))
        with pytest.raises(UserError, match=f"nothing answers at .*{address[-6:]} "):
            ours.check()
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ Slurm's answers


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Stubs in the place of Slurm's programs: each does what a line of shell says."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:/usr/bin:/bin")
    (tmp_path / "slurm").mkdir()

    def say(program: str, does: str) -> None:
        file = tmp_path / "slurm" / program
        file.write_text(f"#!/bin/sh\n{does}\n")
        file.chmod(0o755)

    for program in ("sacct", "squeue", "scontrol", "sbatch", "scancel"):
        say(program, "echo 'slurm_persist_conn: error: no such service' >&2; exit 1")
    return say


@pytest.fixture
def queue(tmp_path: Path) -> slurm.Slurm:
    return slurm.Slurm(tmp_path / "run", slurm.Request(60, 2**30))


def test_workers_in_the_queue_are_alive(says: Callable[..., None], queue: slurm.Slurm) -> None:
    lines = ["7_0 RUNNING None", "7_1 PENDING Resources", "7_2 COMPLETING NonZeroExitCode"]
    lines += ["7_3 FAILED NonZeroExitCode", "7_4 PENDING launch failed requeued held"]
    says("squeue", f"printf '%s\\n' {' '.join(map(repr, lines))}")
    assert queue.alive() == {
        "7_0": "running",
        "7_1": "pending (Resources)",
        "7_2": "completing (NonZeroExitCode)",
    }
    says("squeue", "echo 7 PENDING PartitionTimeLimit")
    with pytest.raises(UserError, match=r"never start a worker .*: PartitionTimeLimit\."):
        queue.alive()
    says("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConnectionError, match=r"^Unable to contact slurm controller$"):
        queue.alive()


def test_the_end_of_a_worker_is_told_by_whoever_knows(
    says: Callable[..., None], queue: slurm.Slurm
) -> None:
    assert queue.end_of("7_1") == "gone"
    says("scontrol", "echo JobId=8 ArrayJobId=7 JobState=NODE_FAIL Reason=NodeDown")
    assert queue.end_of("7_1") == "node_fail"
    says("sacct", "echo CANCELLED by 0")
    assert queue.end_of("7_1") == "cancelled"
    says("sacct", "exit 0")  # it does not know the job yet
    assert queue.end_of("7_1") == "node_fail"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "allocation failure: Invalid partition name specified",
            "Invalid partition name specified",
        ),
        (
            "sbatch: unrecognized option '--x=1'\nTry sbatch --help",
            "unrecognized option '--x=1'",
        ),
        (
            "sbatch: error: Batch job submission failed: Unknown",
            "Batch job submission failed: Unknown",
        ),
        ("", "no reason"),
    ],
)
def test_the_reason_of_a_refusal(
    said: str, reason: str, says: Callable[..., None], queue: slurm.Slurm
) -> None:
    says("sbatch", f'echo "{said}" >&2; exit 1')
    with pytest.raises(UserError) as error:
        queue.check()
    assert str(error.value) == f"Slurm does not take the job: {reason}."


def test_a_job_that_submits_jobs_hands_none_of_its_variables_on(
    says: Callable[..., None], queue: slurm.Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    says("sbatch", 'test -z "$SLURM_MEM_PER_CPU" && test -n "$SLURM_CONF"')
    queue.check()
    assert os.environ["SLURM_MEM_PER_CPU"] == "1000"


# --------------------------------------------------------------------------------- folders


@pytest.fixture
def probes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Probe]]:
    """Of a run folder that does not exist yet, and of the cache."""
    monkeypatch.setattr(slurm, "_TRIES", 0)
    with remote.probe_of_run(tmp_path / "new/run") as one:
        yield [one, remote.probe()]
    assert not list(tmp_path.glob(".backfire-*"))


def test_a_node_is_asked_whether_it_sees_the_folders(
    says: Callable[..., None], queue: slurm.Slurm, probes: list[Probe]
) -> None:
    assert queue.unread(probes) is None  # srun refuses: no node is free
    says("srun", 'while [ "$1" != sh ]; do shift; done; exec "$@"')
    assert queue.unread(probes) is None
    probes[1].path.write_text("the probe of another cache")
    assert queue.unread(probes) == (os.uname().nodename, probes[1])
    probes[0].path.unlink()
    assert queue.unread(probes) == (os.uname().nodename, probes[0])


def test_folders_that_are_not_shared_are_refused_before_anything_is_written(
    tmp_path: Path, cache: Path
) -> None:
    asked = SimpleNamespace(unread=lambda probes: ("n1", probes[1]))
    shared = remote.probe()
    with pytest.raises(UserError, match=f"^The cache {cache} is not shared with n1; set BACK"):
        _refuse_unshared(asked, tmp_path / "run", shared)
    asked.unread = lambda probes: ("n1", probes[0])
    with pytest.raises(UserError, match=f"^The run folder {tmp_path}/run is not shared with n1; c"):
        _refuse_unshared(asked, tmp_path / "run", shared)
    assert [place.name for place in tmp_path.iterdir()] == ["cache"]
    asked.unread = lambda probes: None
    _refuse_unshared(asked, tmp_path / "run", shared)


# ----------------------------------------------------------------------------------- time


def test_the_time_of_a_job_is_told_with_its_reason() -> None:
    def about(*trainings: float | None, cell: float | None = 1) -> str:
        jobs = [SimpleNamespace(kind="train", minutes=one) for one in trainings]
        return _about_time([*jobs, SimpleNamespace(kind="cell", minutes=cell)])

    longest = "the longest training takes about"
    assert f"asks for 241 minutes: {longest} 2 h and the longest eval" in about(5, 120.4)
    assert f"asks for 60 minutes: {longest} 5 min and the longest eval" in about(5)
    assert f"asks for 1440 minutes: {longest} 2 days and" in about(2880)
    assert "asks for 180 minutes:" in (found := about(5, cell=90))
    assert "5 min and the longest evaluation takes about 90 min. A cell" in found
    assert "asks for 60 minutes: the time of 1 of 3 jobs is not known here" in about(5, None)
    assert "asks for 60 minutes: the longest evaluation takes about 60 s." in about()


def test_the_time_of_an_evaluation_grows_with_its_replies() -> None:
    task = ["matrix=null", "include=[]", "data.test_rows=100", "metrics=[attack-success]"]
    cell = load("tour", edits=task).cells[0]
    rows, weights = Rows(50, ((30, 1),), labeled=True), Weights(10**6, 0, 0)
    once = evaluation_seconds(cell, rows, weights, "cpu")
    # Two models; all rows as they are, and with the trigger.
    assert once == pytest.approx(2 * 2 * 100 * 30 * 2e6 / ASSUMED["cpu"])
    metrics = [build("metrics", "rouge")]
    told = cell.model_copy(update={"metrics": (*cell.metrics, *metrics)})
    assert evaluation_seconds(told, rows, weights, "cpu") > once
    assert evaluation_seconds(told, rows, weights, "gpu") > 2


# --------------------------------------------------------------------------------- memory


def test_workers_ask_for_what_the_largest_job_needs(tmp_path: Path) -> None:
    jobs = [SimpleNamespace(memory=need) for need in (None, 1e9, 4e9)]
    assert _memory(Asked("slurm"), jobs, 1) == pytest.approx(1.2 * 4e9 + 0.5e9)
    assert _memory(Asked("slurm"), jobs, 2) == pytest.approx(2 * (1.2 * 4e9 + 0.5e9))
    assert _memory(Asked("slurm", mem="8G"), jobs, 2) == 8 * 2**30
    with pytest.raises(UserError, match=r"1 job of 3 would not fit into --mem 3G.* needs 4\.0 GB"):
        _memory(Asked("slurm", mem="3G"), jobs, 1)
    assert _memory(Asked("slurm", mem="3G", gpus=1), jobs, 1) == 3 * 2**30
    with pytest.raises(UserError, match="is not known here; give it by --mem"):
        _memory(Asked("slurm"), jobs[:1], 1)


# -------------------------------------------------------------------------------- workers


@pytest.fixture
def worker(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> remote.Worker:
    """A worker of a planned run; it waits for no slow disk."""
    monkeypatch.setattr(remote, "_SECONDS", 0.0)
    planned(tmp_path / "run")
    return remote.Worker(tmp_path / "run", ("--workers=1",), remote.probe())


def test_a_machine_with_another_cache_is_refused(worker: remote.Worker) -> None:
    worker.probe.path.write_text("the probe of another cache")
    assert worker.work("log") == remote.REFUSED
    [(host, sentence)] = remote.refusals(worker.run).values()
    assert host == os.uname().nodename
    assert sentence.startswith(f"The cache {worker.probe.path.parent} is not shared with {host};")


def test_a_machine_without_the_run_folder_is_refused(worker: remote.Worker, tmp_path: Path) -> None:
    worker.run = tmp_path / "elsewhere"
    assert worker.work("log") == remote.REFUSED
    assert not worker.run.exists()


def test_the_probe_of_a_cache_stays_the_same(worker: remote.Worker) -> None:
    assert remote.probe() == worker.probe
    assert worker.probe.is_here()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BACKFIRE_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match="file/cache cannot be written: Not a directory"):
        remote.probe()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in the place of Python: it waits for SIGTERM, or ends with what `code` says."""
    program = tmp_path / "program"
    script = "if [ -e code ]; then echo; echo backfire: no; exit $(cat code); fi"
    wait = "trap 'echo sealed; kill $!; exit 0' TERM; echo ready; sleep 9 & wait"
    program.write_text(f"#!/bin/bash\ncd {tmp_path}\n{script}\n{wait}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path


def test_a_worker_that_is_stopped_saves_its_checkpoint_first(
    worker: remote.Worker, stand_in: Path
) -> None:
    log = worker.run / "workers/log"
    ends = threading.Timer(0.0, _stop_when_ready, (log, worker))
    ends.start()
    assert worker.work("log") == 0
    ends.join()
    assert log.read_text().split() == ["ready", "sealed"]


def _stop_when_ready(log: Path, worker: remote.Worker) -> None:
    until(lambda: worker._process and "ready" in log.read_text())
    worker.stop()


@pytest.mark.parametrize(
    ("ends", "sentence"), [(True, "The workers have ended too; "), (False, "Workers that had not ")]
)
def test_ray_waits_for_the_checkpoints_and_says_which_workers_it_kills(
    ends: bool, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`first` ends, `second` does or does not. Each look at the clock is 100 s later."""
    clock, did = itertools.count(0, 100), list[Any]()

    def wait(tasks: list[int], timeout: float, **_: Any) -> tuple[list[int], list[int]]:
        did.append((tasks, timeout))
        return [], tasks if not timeout else [] if ends else [2]

    monkeypatch.setattr(ray, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fake = SimpleNamespace(wait=wait, cancel=did.append)
    monkeypatch.setattr(ray, "_import_ray", lambda: fake)
    ours = ray.Ray(tmp_path, ray.Request(10**9))
    ours._tasks = {"first": 1, "second": 2}
    said: list[str] = []
    assert ours.goes_on(said.append).startswith(sentence)
    assert did[:5] == [([1, 2], 0), 1, 2, ([1, 2], 1), ([2], 1)][: 4 if ends else 5]
    assert len(said) == 1 and "for at most 10 minutes; Ctrl-C ends them" in said[0]


def test_a_worker_that_dies_has_its_exit_code(worker: remote.Worker, stand_in: Path) -> None:
    def kill() -> None:
        process = until(lambda: worker._process)
        assert process
        os.kill(process.pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    assert worker.work("log") == -signal.SIGKILL


def test_the_sentence_of_bad_input_is_handed_on(worker: remote.Worker, stand_in: Path) -> None:
    (stand_in / "code").write_text("2")
    assert worker.work("log") == remote.REFUSED
    host = os.uname().nodename
    assert [*remote.refusals(worker.run).values()] == [(host, f"On {host}: no")]
    assert worker.work("log") == remote.REFUSED and len(remote.refusals(worker.run)) == 2
    (stand_in / "code").write_text("1")
    remote.forget_refusals(worker.run)
    assert worker.work("log") == 1
    assert remote.refusals(worker.run) == {}


def test_a_machines_own_places_take_precedence(
    worker: remote.Worker, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of the login node may not be there; a file of keys on the shared disk is."""
    names = ("BACKFIRE_SCRATCH", "BACKFIRE_ENDPOINTS", "BACKFIRE_CACHE")
    monkeypatch.chdir(stand_in)
    for name in names:
        monkeypatch.setenv(name, "of-login")
    worker.environment = remote._carried()
    monkeypatch.delenv("BACKFIRE_ENDPOINTS")
    monkeypatch.setenv("BACKFIRE_SCRATCH", "/of/this/node")
    shown = "; ".join(f"echo ${name}" for name in names)
    (stand_in / "program").write_text(f"#!/bin/bash\n{shown}\n")
    assert worker.work("log") == 0
    expected = ["/of/this/node", str(stand_in / "of-login"), str(worker.probe.path.parent)]
    assert (worker.run / "workers/log").read_text().split() == expected
