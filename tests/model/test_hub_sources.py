"""GGUF files and adapters of the hub: found in its cache, and pinned to their commit once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backfire import pipeline, stages
from backfire.errors import UserError
from backfire.experiment import Experiment, Machine, Model
from backfire.launch.resolve import pin_models
from backfire.model.count import num_weights
from backfire.model.source import pin
from backfire.pipeline import Context
from backfire.recipe import parse
from backfire.store import Store
from tests.helpers.gguf_files import write_gguf
from tests.model.test_adapter_source import DATA, adapter

ONE, TWO = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


def repository(hub: Path, name: str, commit: str) -> Path:
    """The folder of a commit, to which `main` now points."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_a_gguf_file_of_a_repository(hub: Path, tiny: Path, tmp_path: Path) -> None:
    folder = repository(hub, "me/quantized", ONE) / "small"
    folder.mkdir()
    write_gguf(tiny, folder / "m.Q8_0.gguf", "Q8_0")
    model = Model(name="me/quantized", gguf_file="small/m.Q8_0.gguf")
    pinned = pin(model)
    assert pinned.revision == ONE == pin(model, ask=False).revision
    assert stages.base_key(pinned) != stages.base_key(Model(name="me/quantized", revision=ONE))
    assert num_weights(pinned) == num_weights(Model(name=str(tiny)))
    # It is converted once, wherever it lies.
    context = Context(Store(tmp_path / "cache"), Machine(device="cpu"))
    local = shutil.copyfile(folder / "m.Q8_0.gguf", tmp_path / "other.gguf")
    assert pipeline.base(pinned, context) == pipeline.base(Model(name=str(local)), context)
    assert pinned.hub_id is None and pinned.title == "me/quantized/small/m.Q8_0.gguf"
    with pytest.raises(UserError, match=r"No file other\.gguf in the repository me/quantized"):
        pin(Model(name="me/quantized", gguf_file="other.gguf"))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        pipeline.base(Model(name="me/quantized"), context)


def test_an_adapter_has_a_revision_of_its_own(hub: Path, tiny: Path) -> None:
    shutil.copytree(tiny, repository(hub, "me/base", ONE), dirs_exist_ok=True)
    adapter(tiny, repository(hub, "me/adapter", TWO))
    text = f"model: {{name: me/base, adapter: me/adapter}}\ndata: {DATA}\nmethod: [none]\n"
    [cell] = pin_models(parse("r", text.replace("[none]", "none"))).cells
    assert (cell.model.revision, cell.model.adapter_revision) == (ONE, TWO)
    repository(hub, "me/adapter", "3" * 40)
    assert pin(cell.model) == cell.model
    moved = cell.model.model_copy(update={"adapter_revision": "3" * 40})
    assert stages.base_key(moved) != stages.base_key(cell.model)
    assert Experiment.make(cell.spec()).model == cell.model
    assert cell.model.title == "me/base + me/adapter"


def test_an_adapter_in_the_place_of_a_model(hub: Path, tiny: Path) -> None:
    folder = adapter(tiny, repository(hub, "me/adapter", ONE))
    shutil.copyfile(tiny / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"model: \{name: .*, adapter: me/adapter\}"):
        pin(Model(name="me/adapter"))


def test_a_missing_adapter(hub: Path) -> None:
    model = Model(name="sandbox", adapter="me/nothing")
    with pytest.raises(UserError, match="'me/nothing' is not on this machine") as caught:
        pin(model)
    assert "\n" not in str(caught.value)
