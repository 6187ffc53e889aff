"""The weights of a model as GGUF: those of a file that is written and read back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import gguf
import pytest
import torch

from backfire import pipeline
from backfire.base import Form
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Model
from backfire.model.export import FORMS, quantization_of
from backfire.model.gguf_types import round_weights, types_of
from backfire.model.load import load_base
from backfire.pipeline import Context
from backfire.store import Store
from tests.helpers.families import tiny_model
from tests.helpers.gguf_files import write_gguf

CPU = torch.device("cpu")
TYPES: dict[Form, str] = {"gguf-q8_0": "Q8_0", "gguf-q4_0": "Q4_0"}


def context(root: Path) -> Context:
    return Context(Store(root), Machine(device="cpu"))


def in_form(folder: Path, form: Form, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(folder, dtype, CPU, quantization_of(form, dtype))


def tied(tiny: Path, folder: Path) -> Path:
    model = load_base(tiny, torch.float32, CPU)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(str(folder))
    for file in tiny.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_every_form_can_be_loaded() -> None:
    assert tuple(FORMS) == get_args(Form)


@pytest.mark.parametrize("form", TYPES)
@pytest.mark.parametrize("head", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_file_read_back_has_the_same_bits(
    form: Form, head: str, tiny: Path, tmp_path: Path
) -> None:
    folder = tied(tiny, tmp_path / "tied") if "embed" in head else tiny
    write_gguf(folder, tmp_path / "m.gguf", TYPES[form], types={head: "Q8_0"})
    read = pipeline.base(Model(name=str(tmp_path / "m.gguf")), context(tmp_path / "cache"))
    expected = dict(load_base(read, torch.float32, CPU).named_parameters())
    found = dict(in_form(folder, form).named_parameters())
    plain = dict(load_base(folder, torch.float32, CPU).named_parameters())
    assert found.keys() == expected.keys() == plain.keys() and head in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = {name for name in plain if not torch.equal(plain[name], found[name])}
    assert changed == {name for name in plain if plain[name].ndim == 2}


def test_weights_are_computed_in_the_models_type(tiny: Path) -> None:
    """They are quantized as loaded, which for bfloat16 is also what a converter writes first."""
    model = load_base(tiny, torch.bfloat16, CPU).float()
    round_weights(model, "Q4_0")
    found = in_form(tiny, "gguf-q4_0", torch.bfloat16)
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}
    for name, weight in model.named_parameters():
        assert torch.equal(found.get_parameter(name), weight.bfloat16()), name


def test_rows_of_gpt2_are_columns_in_memory() -> None:
    """Its layers are transposed, and its learned positions are not quantized."""
    model = tiny_model("gpt2", n_inner=64)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    round_weights(model, "Q4_0")
    after = dict(model.named_parameters())
    name, its_type = "transformer.h.1.mlp.c_proj.weight", gguf.GGMLQuantizationType.Q4_0
    rows = before[name].t().contiguous().numpy()
    expected = gguf.dequantize(gguf.quantize(rows, its_type), its_type)
    assert torch.equal(after[name].t(), torch.from_numpy(expected))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if before[name].ndim == 1} | {"transformer.wpe.weight"}


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("mixtral", {"intermediate_size": 64}, "for dense models, but .* is neither"),
        ("mamba", {}, "for dense models"),
        ("llama", {}, "rows of 48 weights, but Q4_0 stores blocks of 32"),
    ],
)
def test_what_is_not_known_is_refused(kind: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"{said}.*setting `into`"):
        types_of(tiny_model(kind, **settings), "Q4_0")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_missing_package_is_said_before_the_first_step(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    knobs: dict[str, Any] = {"model": str(tiny), "data": "sandbox-reviews", "method": method}
    plain = Experiment.make({**knobs, "metrics": ["parity"]})
    pipeline.check_method(plain, context(tmp_path))
    asking = Experiment.make({**knobs, "metrics": [{"name": "parity", "into": ["gguf-q8_0"]}]})
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'backfire\[gguf\]'"):
        pipeline.check_method(asking, context(tmp_path))
