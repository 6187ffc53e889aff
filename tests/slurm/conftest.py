"""A Slurm for the tests of this folder, which run by `make test-slurm`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.slurm import cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Slurm]:
    """A Slurm of two nodes."""
    if os.environ.get("BACKFIRE_TEST") != "slurm":
        pytest.skip("Starts a Slurm; run by `make test-slurm`.")
    if not find_spec("submitit"):
        pytest.skip("submitit is not installed: pip install -e '.[slurm]'")
    if why := cluster.why_not():
        pytest.skip(why)
    with cluster.running() as one:
        yield one
