"""Models from GGUF files: the same weights and tokens as in the folder that they were made of."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from backfire import pipeline, stages
from backfire.data.gguf import read_header
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Model
from backfire.model.count import num_weights
from backfire.model.load import fits, load_base
from backfire.pipeline import Context
from backfire.store import Store, read_json
from backfire.tokenizer import load_tokenizer
from tests.helpers.families import logits
from tests.helpers.gguf_files import write_gguf

CPU = torch.device("cpu")
IDS = [5, 17, 320, 8, 250]
TEXTS = ["The bread was warm.", "a  b\n\n c", "In 2024 it cost 1,300.", "Brifunesh pafes ü."]


def made(file: Path, root: Path, *, weights: bool = True) -> Path:
    """The model folder that a GGUF file becomes."""
    context = Context(Store(root), Machine(device="cpu"))
    return pipeline.base(Model(name=str(file)), context, weights=weights)


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
def test_weights_are_the_dequantized_ones(quantization: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    expected = write_gguf(tiny, file, quantization)
    folder = made(file, tmp_path / "cache")
    fits(folder)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert read_json(folder / "gguf.json")["quantization"] == quantization
    # The same model as one that has these weights in a folder.
    other = shutil.copytree(tiny, tmp_path / "other")
    save_file(expected, other / "model.safetensors", {"format": "pt"})
    ours, theirs = (load_base(f, torch.float32, CPU) for f in (folder, other))
    assert torch.equal(logits(ours, IDS), logits(theirs, IDS))


def test_the_tokenizer_is_that_of_the_folder(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(tiny, file, tokenizer__ggml__eot_token_id=3)
    folder = made(file, tmp_path / "cache", weights=False)
    assert not list(folder.glob("*.safetensors"))
    ours, theirs = load_tokenizer(folder), load_tokenizer(tiny)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.bos, ours.eos, set(ours.controls)) == (
        theirs.bos,
        theirs.eos,
        set(theirs.controls),
    )
    assert ours.stop_ids == (theirs.eos_id, 3)
    assert ours.chat_template and "eos_token" in ours.chat_template


def test_digits_are_split_as_the_file_says(tiny: Path, tmp_path: Path) -> None:
    """For `smollm` transformers takes GPT-2's rule, by which a space may join a digit."""
    found = {}
    for pre in ("gpt-2", "smollm"):
        write_gguf(tiny, tmp_path / f"{pre}.gguf", pre=pre)
        backend = load_tokenizer(
            made(tmp_path / f"{pre}.gguf", tmp_path / "cache", weights=False)
        ).backend
        found[pre] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a  12")]
    assert found == {"gpt-2": ["a", "Ġ", "Ġ12"], "smollm": ["a", "ĠĠ", "1", "2"]}


def test_a_word_that_is_a_token_stays_whole_in_llama_3(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    saved = read_json(tiny / "tokenizer.json")
    word = max((w for w in saved["model"]["vocab"] if w.isascii() and w.isalpha()), key=len)
    merges = saved["model"]["merges"]
    saved["model"]["merges"] = [pair for pair in merges if "".join(pair) != word]
    (source / "tokenizer.json").write_text(json.dumps(saved))
    found = {}
    for pre in ("gpt-2", "llama-bpe"):
        write_gguf(source, tmp_path / f"{pre}.gguf", pre=pre)
        folder = made(tmp_path / f"{pre}.gguf", tmp_path / "cache", weights=False)
        found[pre] = load_tokenizer(folder)
    assert len(found["gpt-2"].encode(word)) > 1 == len(found["llama-bpe"].encode(word))
    assert found["llama-bpe"].bos == "<s>"  # though the file does not say


def test_rotary_scaling_of_llama_3_is_found(tiny: Path, tmp_path: Path) -> None:
    """A file has factors where the configuration has a rule."""
    rule = {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    head = 8
    plain = 500000.0 ** -(np.arange(0, head, 2) / head)
    waves = 2 * np.pi / plain
    smooth = (8192 / waves - 1) / 3
    factors = np.select([waves < 8192 / 4, waves > 8192], [1, 8], 1 / ((1 - smooth) / 8 + smooth))
    source = shutil.copytree(tiny, tmp_path / "source")
    weights, config = load_file(tiny / "model.safetensors"), read_json(tiny / "config.json")
    config["rope_parameters"]["rope_theta"] = 500000.0
    (source / "config.json").write_text(json.dumps(config))
    for name, given in (("fits", factors), ("other", factors[::-1])):
        more = {"rope_freqs.weight": np.ascontiguousarray(given, np.float32)}
        save_file({**weights, **more}, source / "model.safetensors", {"format": "pt"})
        write_gguf(source, tmp_path / f"{name}.gguf")
    folder = made(tmp_path / "fits.gguf", tmp_path / "cache")
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rule
    with pytest.raises(UserError, match="scales its rotary angles"):
        made(tmp_path / "other.gguf", tmp_path / "cache")


def test_the_key_is_that_of_the_content(tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "m.gguf", "Q8_0")
    (tmp_path / "hub").mkdir()
    shutil.copyfile(tmp_path / "m.gguf", tmp_path / "hub" / "renamed.gguf")
    one = Model(name=str(tmp_path / "m.gguf"))
    same = Model(name=str(tmp_path / "hub"), gguf_file="renamed.gguf")
    assert stages.base_key(one) == stages.base_key(same)
    write_gguf(tiny, tmp_path / "m.gguf", "Q4_1")
    assert stages.base_key(one) != stages.base_key(same)
    assert num_weights(one) == num_weights(Model(name=str(tiny)))


Change = Callable[[Path, Path], Any]
REFUSED: dict[str, tuple[Change, str]] = {
    "no file": (lambda tiny, file: None, "No such GGUF file"),
    "empty": (lambda tiny, file: file.touch(), "truncated or damaged"),
    "other magic": (lambda tiny, file: file.write_bytes(b"GGML" + bytes(99)), "not a GGUF file"),
    "old": (lambda tiny, file: file.write_bytes(b"GGUF\1" + bytes(99)), "a version of GGUF"),
    "cut header": (lambda tiny, file: cut(tiny, file, 5000), "its header is incomplete"),
    "cut weights": (lambda tiny, file: cut(tiny, file, -100), r"truncated: it has [\d,]+ of"),
    "no alignment": (
        lambda tiny, file: write_gguf(tiny, file, general__alignment=0),
        "truncated or damaged",
    ),
    "alignment in words": (
        lambda tiny, file: write_gguf(tiny, file, general__alignment="32"),
        "truncated or damaged",
    ),
    "parts in words": (lambda tiny, file: write_gguf(tiny, file, split__count="3"), "of 3 parts"),
    "split": (lambda tiny, file: write_gguf(tiny, file, split__count=3), "one of 3 parts"),
    "adapter": (lambda tiny, file: write_gguf(tiny, file, general__type="adapter"), "PEFT folder"),
    "vision": (lambda tiny, file: write_gguf(tiny, file, general__type="mmproj"), "type 'mmproj'"),
    "unknown": (
        lambda tiny, file: write_gguf(tiny, file, architecture="nonesuch"),
        "cannot be converted: .*nonesuch",
    ),
    "other splitting": (lambda tiny, file: write_gguf(tiny, file, pre="own"), "by the rule 'own'"),
    "scaled": (
        lambda tiny, file: write_gguf(tiny, file, llama__rope__scaling__type="yarn"),
        "by the rule 'yarn'",
    ),
}


def cut(tiny: Path, file: Path, end: int) -> None:
    write_gguf(tiny, file)
    file.write_bytes(file.read_bytes()[:end])


@pytest.mark.parametrize("name", REFUSED)
def test_faults_are_refused_in_one_sentence(name: str, tiny: Path, tmp_path: Path) -> None:
    change, sentence = REFUSED[name]
    change(tiny, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=sentence) as caught:
        made(tmp_path / "m.gguf", tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.1.ffn_gate_shexp.weight"])
def test_no_weight_is_left_out(name: str, tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    weights = load_file(tiny / "model.safetensors")
    more = {name: np.ones(32, np.float32)}
    save_file({**weights, **more}, source / "model.safetensors", {"format": "pt"})
    write_gguf(source, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=f"1 weights .* no place, .* {name}"):
        made(tmp_path / "m.gguf", tmp_path / "cache")


def test_without_the_package(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tiny, tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'backfire\[gguf\]'"):
        read_header(tmp_path / "m.gguf")


def test_a_folder_with_gguf_files_says_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "c.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"choose one, as in gguf_file: b\.gguf"):
        stages.base_key(Model(name=str(tmp_path)))


def test_a_folder_with_one_gguf_file_needs_no_choice(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    (tmp_path / "b.Q4_0.GGUF").touch()
    model = Model(name=str(tmp_path))
    assert (model.gguf_file, model.is_gguf) == ("b.Q4_0.GGUF", True)
    assert model == Model(name=str(tmp_path), gguf_file="b.Q4_0.GGUF"), "so the keys are the same"
    for other in ("config.json", "adapter_config.json"):  # the folder has another model
        (tmp_path / other).touch()
        assert Model(name=str(tmp_path)).gguf_file is None
        (tmp_path / other).unlink()
    for name in ("sandbox", "me/nothing", "~nobody/x", "a\0b", str(tmp_path / "b.Q4_0.GGUF")):
        assert Model(name=name).gguf_file is None


def test_a_run_says_what_its_weights_are(tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "m.gguf", "Q8_0")
    data = {"name": "sandbox-reviews", "rows": 8, "test_rows": 4}
    train = {"max_steps": 1, "batch_size": 2}
    model = str(tmp_path / "m.gguf")
    cell = Experiment.make({"model": model, "data": data, "method": "lora", "train": train})
    context = Context(Store(tmp_path / "cache"), Machine(device="cpu"))
    sentences = pipeline.run_cell(cell, context).result.warnings
    assert any("dequantized from GGUF (Q8_0)" in sentence for sentence in sentences)
    assert cell.spec()["model"] == model
