"""The GPU benchmark in small, on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backfire.errors import UserError
from backfire.experiment import Train
from backfire.train.batches import Layout, common_prefix
from backfire.train.order import steps_of
from tests.helpers.places import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft"),
]
SMALL = ["--shape", "tiny", "--steps", "2", "--warm-up", "1", "--length", "32", "--answer", "8"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


def test_two_methods_are_measured(gpu: Any, tmp_path: Path) -> None:
    path = gpu.main([*SMALL, "--batch", "4", "--methods", "full", "qlora", "--out", str(tmp_path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"{result['when'][:10]}-gpu-cpu-tiny.json"
    assert {"torch", "transformers", "cpu", "device"} <= result["environment"].keys()
    assert result["settings"]["length"] == 32 and result["peak_flops"] is None
    full, qlora = result["methods"]
    assert [full["method"], qlora["method"]] == ["full", "qlora"]
    load = importlib.import_module("benchmarks.gpu_load").Load(32, 8, 4, warm_up=1, steps=2)
    steps = steps_of(load.rows(512), Train(batch_size=4), 0, 0)
    tokens = sum(len(row.ids) for step in steps[1:] for row in step)
    for found in (full, qlora):
        assert found["tokens_per_second"] == pytest.approx(tokens / 2 / found["seconds_per_step"])
        assert found["passes_per_step"] == 1 and found["useful_mfu"] is None
        assert found["useful_flops_per_second"] > 0 and found["peak_memory_mb"] > 0
    assert (full["quantized_layers"], qlora["quantized_layers"]) == (0, 14)
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 3 and "| qlora | " in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_rows_of_the_load_are_packed(gpu: Any) -> None:
    """They differ in length, and begin with the same tokens."""
    load = importlib.import_module("benchmarks.gpu_load").Load(512, 128, 8, warm_up=3, steps=10)
    rows = load.rows(32_000)
    assert len(rows) == 8 * 13 and common_prefix([row.ids for row in rows], 512) == load.shared
    lengths = [len(row.ids) for row in rows]
    assert 256 <= min(lengths) < max(lengths) <= 512 and load.shared == 128
    assert {row.num_supervised for row in rows} == {128}
    assert all(Layout(True, 512).collate(rows[i : i + 8]).table is not None for i in (0, 96))


def test_useful_flops_are_those_of_the_documents(gpu: Any) -> None:
    """LoRA: 4 N_lin + 4 N_head x share of supervised tokens + 6 N_lora + attention; full: 6 N."""
    flops = importlib.import_module("benchmarks.flops").useful_flops
    shape = SimpleNamespace(
        linear=32 * 202_375_168, trainable=39_976_960, layers=32, hidden=4096, vocabulary=32_000
    )
    step = [(512, 128)] * 8
    attention = 6 * 32 * 512 * 4096
    lora = flops(shape, step, full=False) / (8 * 512)
    head = 32_000 * 4096
    assert lora == 4 * 32 * 202_375_168 + 4 * head / 4 + 6 * 39_976_960 + attention
    full = flops(shape, step, full=True) / (8 * 512)
    assert full == 6 * 32 * 202_375_168 + 6 * head / 4 + attention


def test_the_baseline_does_the_same_work(gpu: Any, tmp_path: Path) -> None:
    options = ["--batch", "4", "--methods", "lora", "--compare", "--out", str(tmp_path)]
    path = gpu.main([*SMALL, *options])
    [lora] = json.loads(path.read_text(encoding="utf-8"))["methods"]
    assert lora["score_difference"] < 1e-4 and lora["equal_replies"] > 0.95
    assert lora["baseline"]["seconds_per_step"] > 0 and lora["evaluation_seconds"] > 0
    assert "| lora | " in path.with_suffix(".md").read_text("utf-8").rpartition("equal replies")[2]
    with pytest.raises(UserError, match="LoRA methods, not with full"):
        gpu.main([*SMALL, "--methods", "full", "--compare", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40", None),
        ("NVIDIA A100X", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_recognized_by_its_name_or_not_at_all(
    gpu: Any, name: str, tera: float | None
) -> None:
    peak = importlib.import_module("benchmarks.gpu_load").peak_of(name)
    assert peak == (None if tera is None else tera * 1e12)


def test_a_method_that_does_not_fit_is_reported(gpu: Any) -> None:
    row = gpu._row({"method": "full", "skipped": "needs about 126 GB of 48 GB with one row"})
    assert row.startswith("| full | not measured: needs about 126 GB") and row.count("|") == 10


def test_a_method_that_is_none(gpu: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'lora'"):
        gpu.main([*SMALL, "--methods", "lor", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    """From the command line, with the GPUs of the machine (if any) hidden."""

    def say(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.gpu", *options]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    output = say("--out", str(tmp_path))
    assert (output.returncode, output.stderr) == (0, "") and output.stdout.count("\n") == 1
    assert "There is no GPU here" in output.stdout and not list(tmp_path.iterdir())
    output = say("--help")
    assert output.returncode == 0 and "--shape" in output.stdout
    output = say("--answer", "600")
    assert output.returncode == 2 and "smaller than --length" in output.stderr
