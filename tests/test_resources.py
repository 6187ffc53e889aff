"""Cores, memory and GPUs that are really ours, on made-up machines."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from backfire import resources
from backfire.resources import Groups

GIB = 2**30


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)


def groups(root: Path, listing: str, **files: str) -> Groups:
    """Control groups with these files; `__` in a name is a slash and the last `_` before the
    file's name is a dot, as in `job__memory_max`."""
    for name, text in files.items():
        folder, _, file = name.rpartition("__")
        path = root / folder.replace("__", "/") / file.replace("_", ".", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "listing").write_text(listing)
    return Groups(root, root / "listing")


def test_every_group_around_a_nested_one_counts(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/job/step\n",
        cpu_max="max 100000\n",
        job__cpu_max="350000 100000\n",
        job__step__cpu_max="800000 100000\n",
        job__memory_max="8000\n",
        job__memory_current="5000\n",
        job__memory_stat="anon 100\ninactive_file 1500\nactive_file 500\nshmem 9\n",
        job__step__memory_max="max\n",
        job__step__memory_high="9000\n",
        job__step__memory_current="1000\n",
    )
    assert list(found.cores()) == [8, 4], "3.5 cores need four threads"
    assert list(found.memory()) == [(9000, 1000), (8000, 3000)]


def test_version_1_has_a_tree_for_each_kind(tmp_path: Path) -> None:
    job = {
        "cpu_cfs_quota_us": "200000\n",
        "cpu_cfs_period_us": "100000\n",
        "memory_limit_in_bytes": "8000\n",
        "memory_usage_in_bytes": "6000\n",
        "memory_stat": "inactive_file 1\ntotal_inactive_file 2000\ntotal_active_file 0\n",
    }
    here = {f"{name.split('_')[0]}__job__{name}": text for name, text in job.items()}
    listing = "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n0::/\n"
    found = groups(tmp_path, listing, cpu__cpu_cfs_quota_us="-1\n", **here)
    assert list(found.cores()) == [2]
    assert list(found.memory()) == [(8000, 4000)]


def test_in_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/../outside/pod\n", cpu_max="150000 100000", memory_max="7\n")
    assert list(found.cores()) == [2] and list(found.memory()) == [(7, 0)]
    both = groups(
        tmp_path / "hybrid",
        "4:memory:/docker/1\n0::/docker/1\n",
        memory__memory_limit_in_bytes="9\n",
        unified__docker__1__cpu_max="50000 100000",
    )
    assert list(both.cores()) == [1] and list(both.memory()) == [(9, 0)]


@pytest.mark.parametrize("text", ["max\n", "", "max 100000\n", "-1 100000\n", "0 0\n", "what\n"])
def test_no_limit_is_none(text: str, tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/\n", cpu_max=text, memory_max=text.split()[0] if text else "")
    assert list(found.cores()) == []
    assert list(Groups(tmp_path, tmp_path / "absent").memory()) == []


def test_the_smallest_limit_of_cores_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(Groups, "cores", lambda _: iter([20, 10]))
    assert resources.cores() == 10
    monkeypatch.setattr(Groups, "cores", lambda _: iter([]))
    assert resources.cores() == 12
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert resources.cores() == 8
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x3),1")
    assert resources.cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert resources.cores() == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "many")
    assert resources.cores() == 4


def test_the_smallest_limit_of_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(total=64 * GIB, available=50 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(Groups, "memory", lambda _: iter([]))
    assert (resources.ram_bytes(), resources.free_bytes()) == (64 * GIB, 50 * GIB)
    monkeypatch.setattr(Groups, "memory", lambda _: iter([(40 * GIB, 30 * GIB), (9, 10)]))
    assert (resources.ram_bytes(), resources.free_bytes()) == (9, 0)
    monkeypatch.setattr(Groups, "memory", lambda _: iter([(40 * GIB, 30 * GIB)]))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of it
    assert (resources.ram_bytes(), resources.free_bytes()) == (40 * GIB, 10 * GIB)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert resources.ram_bytes() == 40 * GIB, "Slurm has told of no limit"
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "2048")
    assert (resources.ram_bytes(), resources.free_bytes()) == (8 * GIB, 8 * GIB)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2")
    assert resources.ram_bytes() == 2 * GIB


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("2, 0", ["2", "0"]),
        ("0,-1,1", ["0"]),
        ("7", []),
        ("GPU-1b2c,MIG-3d", ["GPU-1b2c", "MIG-3d"]),
        ("none", []),
        ("1,7,0", ["1"]),
    ],
)
def test_only_visible_gpus_count(
    listed: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert resources.gpus(tmp_path) == [], "no GPU, whatever is listed"
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert resources.gpus(tmp_path) == seen


@pytest.mark.parametrize(
    ("listed", "named"),
    [
        *[(None, []), ("", []), ("-1", []), ("none", []), ("NoDevFiles", [])],
        *[("7", ["7"]), ("0, 7,-1,2", ["0", "7"]), ("GPU-1b,MIG-2c", ["GPU-1b", "MIG-2c"])],
    ],
)
def test_gpus_are_named_whether_they_are_there_or_not(
    listed: str | None, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert resources.named_gpus() == named


def test_a_gpu_of_the_windows_subsystem_counts(tmp_path: Path) -> None:
    (tmp_path / "dxg").touch()
    assert resources.gpus(tmp_path) == ["0"]


def test_here_there_is_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= resources.cores() <= (os.cpu_count() or 1)
    assert 0 < resources.ram_bytes() <= psutil.virtual_memory().total
    assert 0 <= resources.free_bytes() < math.inf
