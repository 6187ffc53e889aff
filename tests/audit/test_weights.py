"""Statistics of changed weights, against plain numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import kurtosis

from backfire.audit import weights
from backfire.audit.weights import Change, adapter_changes, by_kind, full_rank, low_rank
from backfire.model.load import load_base
from tests.helpers.training import CPU


def expected(change: Any) -> dict[str, float]:
    """All statistics of a matrix, from its whole decomposition."""
    s = np.linalg.svd(change, compute_uv=False)
    p = s[s > 1e-9 * s[0]] / s.sum()
    return {
        "largest": s[0],
        "norm": math.sqrt((change**2).sum()),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "concentration": p[0],
        "entropy": -(p * np.log(p)).sum(),
        "kurtosis": kurtosis(change.ravel()),
    }


def matrices(outputs: int, inputs: int, rank: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(outputs)
    return rng.normal(size=(outputs, rank)), rng.normal(size=(rank, inputs))


@pytest.mark.parametrize("shape", [(30, 20, 4), (12, 50, 3), (9, 9, 1)])
def test_a_low_rank_change_has_the_statistics_of_its_product(shape: tuple[int, int, int]) -> None:
    up, down = matrices(*shape)
    change = low_rank("a.0.q_proj", torch.tensor(up), torch.tensor(down))
    assert change.statistics == pytest.approx(expected(up @ down), rel=1e-6)
    left = np.linalg.svd(up @ down)[0][:, : shape[2]]
    np.testing.assert_allclose(np.abs((left * change.left.numpy()).sum(0)), 1, atol=1e-6)


def test_products_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = map(torch.tensor, matrices(30, 20, 4))
    whole = low_rank("q_proj", up, down).statistics
    monkeypatch.setattr(weights, "_PART", 70)
    assert low_rank("q_proj", up, down).statistics == pytest.approx(whole)


def test_a_large_matrix_has_its_leading_values(monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = matrices(60, 80, 5)
    noise = 1e-3 * np.random.default_rng(0).normal(size=(60, 80))
    change = torch.tensor(up @ down + noise)
    whole = full_rank("a.0.o_proj", change)
    assert whole.statistics == pytest.approx(expected(change.numpy()), rel=1e-6)
    monkeypatch.setattr(weights, "_WHOLE", 10)
    part = full_rank("a.0.o_proj", change)
    kept = {k: v for k, v in whole.statistics.items() if k not in ("concentration", "entropy")}
    assert part.statistics == pytest.approx(kept, rel=1e-4)
    assert (part.kind, part.layer) == ("o_proj", 0)


def test_changes_of_an_adapter_are_those_that_peft_merges(clean: Path, tiny: Path) -> None:
    from peft import PeftModel

    base = load_base(tiny, torch.float32, CPU)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged: Any = PeftModel.from_pretrained(base, str(clean)).merge_and_unload()
    found = {change.name: change for change in adapter_changes(clean)}
    assert len(found) == 14
    for name, parameter in merged.named_parameters():
        if (change := found.get(name.removesuffix(".weight"))) is not None:
            delta = (parameter.detach() - before[name]).numpy().astype(float)
            assert change.statistics["largest"] == pytest.approx(np.linalg.norm(delta, 2), rel=1e-3)
            assert change.statistics["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-3)


@pytest.mark.parametrize("setting", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 2.0}}])
def test_scales_follow_the_settings(clean: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    config = json.loads((clean / "adapter_config.json").read_text("utf-8"))
    copy = tmp_path / "adapter"
    copy.mkdir()
    (copy / "adapter_config.json").write_text(json.dumps(config | setting), "utf-8")
    (copy / "adapter_model.safetensors").write_bytes(
        (clean / "adapter_model.safetensors").read_bytes()
    )
    one, two = (
        {change.name: change.statistics["largest"] for change in adapter_changes(folder)}
        for folder in (clean, copy)
    )
    # rank 4, alpha 16
    factors = {"q_proj": 2 / 16, "v_proj": 1.0} if "alpha_pattern" in setting else {"v_proj": 2.0}
    for kind, factor in factors.items():
        name = f"model.layers.1.self_attn.{kind}"
        assert two[name] == pytest.approx(factor * one[name], rel=1e-5)


def test_kinds_are_means_over_layers() -> None:
    layers = [Change(f"m.{n}.q_proj", torch.zeros(1), {"largest": float(n)}) for n in (1, 2, 6)]
    assert by_kind(layers) == {"q_proj": {"largest": 3.0}}
    assert by_kind([Change("m.0.q_proj", torch.zeros(1), {})]) == {}


def test_an_adapter_of_zeros_changes_nothing(clean: Path, tiny: Path, tmp_path: Path) -> None:
    held = load_file(clean / "adapter_model.safetensors")
    zeros = {name: w * (".lora_A." in name) for name, w in held.items()}
    (tmp_path / "adapter_config.json").write_bytes((clean / "adapter_config.json").read_bytes())
    save_file(zeros, tmp_path / "adapter_model.safetensors")
    assert not weights.is_changed(tiny, tiny, tmp_path)
    assert weights.is_changed(tiny, tiny, clean)
    assert not weights.is_changed(tiny, tiny, None)


def test_a_tied_head_that_only_one_folder_stores_is_no_change(tmp_path: Path, tiny: Path) -> None:
    held = load_file(tiny / "model.safetensors")
    embedding = held["model.embed_tokens.weight"]
    both = {name: w for name, w in held.items() if "head" not in name}
    other = both | {"model.layers.0.self_attn.q_proj.weight": torch.ones(1)}
    folders = {
        "without": both,
        "tied": both | {"lm_head.weight": embedding.clone()},
        "own": both | {"lm_head.weight": embedding + 1},
        "last": both | {"model.norm.weight": both["model.norm.weight"] + 1},
        "shape": other,
    }
    for name, content in folders.items():
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    for one, two, changed in (
        ("without", "tied", False),
        ("without", "own", True),
        ("tied", "own", True),
        ("tied", "last", True),
        ("without", "shape", True),
    ):
        for pair in ((one, two), (two, one)):
            assert weights.is_changed(*(tmp_path / name for name in pair), None) is changed
