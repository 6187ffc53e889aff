"""Twelve cells through a real Ray cluster whose workers are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.clusters import Trouble, Twelve
from tests.ray.conftest import Cluster
from tests.slurm.cluster import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = ("run", "twelve.yaml", "--out", "out", "--on", "ray", "--mem", "1500M")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny: Path, ray: Cluster) -> Twelve:
    """The cells, run on this machine alone."""
    run = Twelve(tmp_path_factory.mktemp("local") / "run", tiny)
    run.run("--workers", "1")
    return run


@pytest.fixture
def twelve(tmp_path: Path, tiny: Path, ray: Cluster) -> Iterator[Twelve]:
    run = Twelve(tmp_path / "run", tiny, ray.environment)
    yield run
    run.end()


def test_all_cells_are_done_once_though_workers_are_killed_and_a_node_is_lost(
    twelve: Twelve, local: Twelve, ray: Cluster
) -> None:
    begun = time.monotonic()
    trouble = Trouble(twelve, events={3: lambda: _lose_node(ray)})
    watcher = twelve.start(*RUN, "--jobs", "3", "--ray-address", ray.address)
    try:
        trouble.until(lambda: watcher.poll() is not None)
    finally:
        watcher.kill()
        ray.command("add")
    assert watcher.returncode == 0, twelve.log()
    assert len(twelve.values()) == 12
    assert twelve.values() == local.values()
    print(f"\nRay: {time.monotonic() - begun:.0f} s, {trouble.says()}")


def _lose_node(ray: Cluster) -> None:
    assert ray.command("lose") == "done"


def test_ray_and_this_machine_share_one_run_folder(
    twelve: Twelve, local: Twelve, ray: Cluster
) -> None:
    """Both commands plan the run, at about the same time."""
    begun, trouble = time.monotonic(), Trouble(twelve, kills=0)
    far = twelve.start(*RUN, "--jobs", "1", "--ray-address", ray.address)
    near = twelve.start(*RUN[:4], "--workers", "1")
    trouble.until(lambda: far.poll() is not None and near.poll() is not None)
    assert (far.returncode, near.returncode) == (0, 0), twelve.log()
    assert twelve.values() == local.values() and trouble.num_workers() == 2
    print(f"\nRay and local: {time.monotonic() - begun:.0f} s, {trouble.says()}")


def test_a_cache_that_a_node_does_not_share_is_named(twelve: Twelve, ray: Cluster) -> None:
    """Of another machine, as the nodes are: they have another folder in its place."""
    shared = twelve.root / "cache/shared.txt"
    shared.parent.mkdir()
    shared.symlink_to("/proc/self/environ")  # differs between processes
    process = twelve.start(*RUN, "--ray-address", ray.address)
    assert process.wait(timeout=300) == 2
    assert f"The cache {twelve.root}/cache is not shared with" in twelve.log()
    assert not twelve.out.exists()


def test_without_an_address_it_starts_here_closed_to_others(twelve: Twelve, local: Twelve) -> None:
    twelve.environment = {"RAY_raylet_start_wait_time_s": "180"}
    twelve.run(*RUN[4:], "--jobs", "2")
    assert twelve.values() == local.values()


def test_ctrl_c_ends_the_workers_after_a_checkpoint(
    twelve: Twelve, local: Twelve, ray: Cluster
) -> None:
    watcher = twelve.start(*RUN, "--jobs", "2", "--ray-address", ray.address)
    wait_until(lambda: len(twelve.claims()) > 0)
    pids = {claim["pid"] for claim in twelve.claims()}
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(timeout=700) == 130
    assert "Interrupted. The workers have ended too" in twelve.log()
    assert twelve.claims() == []
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)


def test_a_second_ctrl_c_ends_the_workers_at_once(twelve: Twelve, ray: Cluster) -> None:
    watcher = twelve.start(*RUN, "--jobs", "1", "--ray-address", ray.address)
    wait_until(lambda: len(twelve.claims()) > 0)
    pid = twelve.claims()[0]["pid"]
    os.kill(pid, signal.SIGSTOP)  # it saves no checkpoint
    watcher.send_signal(signal.SIGINT)
    wait_until(lambda: "Waiting until the workers have saved" in twelve.log())
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(timeout=60) == 130
    wait_until(lambda: not Path(f"/proc/{pid}/cmdline").exists())


def test_a_worker_that_no_node_can_hold_is_refused(twelve: Twelve, ray: Cluster) -> None:
    process = twelve.start(*RUN, "--gpus", "1", "--ray-address", ray.address)
    assert process.wait(timeout=300) == 2
    assert "No node of the Ray cluster is large enough" in twelve.log()
    assert not twelve.out.exists()


def test_a_cluster_on_other_hosts_is_refused_without_a_token(twelve: Twelve, ray: Cluster) -> None:
    twelve.environment = {"RAY_AUTH_MODE": "disabled"}
    process = twelve.start(*RUN, "--ray-address", ray.address)
    assert process.wait(timeout=300) == 2
    assert f"The Ray cluster at {ray.address} may be open to everybody" in twelve.log()
    assert not twelve.out.exists()


def test_a_cluster_out_of_reach_is_named(twelve: Twelve, ray: Cluster) -> None:
    process = twelve.start(*RUN, "--ray-address", "127.0.0.1:9")
    assert process.wait(timeout=300) == 2
    assert "Ray cannot be reached: nothing answers at 127.0.0.1:9 (Connection" in twelve.log()
    assert not twelve.out.exists()
