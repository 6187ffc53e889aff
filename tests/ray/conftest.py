"""A Ray cluster for the tests of this folder, which run by `make test-ray`."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest


@dataclass
class Cluster:
    """A running Ray cluster of several nodes, all of them on this machine."""

    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]
    """Variables of those who may use it."""

    def command(self, word: str) -> str:
        """Let the process that holds the cluster do something; returns its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


_PATIENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}
_HOLDER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster()
size = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster.add_node(**size)
nodes = [cluster.add_node(**size)]
print(cluster.address, flush=True)
for word in sys.stdin:
    if word.strip() == "lose":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    elif word.strip() == "add":
        nodes.append(cluster.add_node(**size))
    print("done", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="session")
def ray() -> Iterator[Cluster]:
    """A Ray cluster of two nodes. Another process holds it: these tests seal their own off."""
    if os.environ.get("BACKFIRE_TEST") != "ray":
        pytest.skip("Starts a Ray cluster; run by `make test-ray`.")
    if not find_spec("ray"):
        pytest.skip("Ray is not installed: pip install -e '.[ray]'")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process: Any = subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        env={**os.environ, **_PATIENT, **token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start; its output says why"
        yield Cluster(process, address, {**_PATIENT, **token})
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()
