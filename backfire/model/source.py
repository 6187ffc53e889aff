"""Locates a model's files and identifies their exact content. Imports no torch."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from backfire.data.adapter import (
    CONFIG,
    adapter_hash,
    inspect_adapter,
    other_base,
    same_widths,
    why_not_merged,
)
from backfire.data.gguf import read_header
from backfire.data.snapshot import SMALL, snapshot, snapshot_adapter
from backfire.data.weights import files_of, inspect, is_bare, read_config
from backfire.errors import UserError
from backfire.hashes import file_hash, stamp
from backfire.model.settings import Model
from backfire.store import digest

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(model: Model, *, ask: bool = True) -> Model:
    """The model at the commit that its revision points to now. A run resolves it once, so a branch
    that moves later changes nothing, and the key covers the commit. With `ask=False` the hub is not
    contacted: the commit is the last downloaded one, if any.

    Raises:
        UserError: as `fetch`.
    """
    pinned: dict[str, str] = {}
    if model.on_hub and not _COMMIT.fullmatch(model.revision or ""):
        whole = _repository if model.is_gguf else fetch
        folder = whole(model, weights=False) if ask else downloaded(model)
        pinned["revision"] = folder.name if folder else ""  # the hub's cache names them so
    on_hub = model.adapter is not None and not model.adapter_is_local
    if on_hub and not _COMMIT.fullmatch(model.adapter_revision or ""):
        folder = adapter_folder(model) if ask else _downloaded_adapter(model)
        pinned["adapter_revision"] = folder.name if folder else ""
    commits = {key: commit for key, commit in pinned.items() if _COMMIT.fullmatch(commit)}
    return model.model_copy(update=commits) if commits else model


def downloaded(model: Model) -> Path | None:
    """The local folder of a downloaded hub model, or None; the hub is not contacted."""
    return _in_cache(model.name, model.gguf_file or "config.json", model.revision)


def _downloaded_adapter(model: Model) -> Path | None:
    return _in_cache(str(model.adapter), CONFIG, model.adapter_revision)


def _in_cache(repository: str, name: str, revision: str | None) -> Path | None:
    """The folder of a downloaded repository that has this file."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:
        return None
    return Path(file.removesuffix(name)) if isinstance(file, str) else None


def adapter_folder(model: Model) -> Path:
    """The folder with the files of the model's adapter; one of the hub is downloaded first.

    Raises:
        UserError: there is none, or it is of a kind that is not supported, in one sentence.
    """
    assert model.adapter is not None
    if model.adapter_is_local:
        folder = Path(model.adapter).expanduser().resolve()
    else:
        folder = snapshot_adapter(model.adapter, model.adapter_revision)
    config = inspect_adapter(folder)
    if model.name == "sandbox" and (named := other_base(folder, model.title)):
        raise UserError(f"The adapter {model.adapter} is for the base {named}: set model.name.")
    if model.merge and (why := why_not_merged(config)):
        raise UserError(f"The adapter {model.adapter} cannot be merged: {why}.")
    return folder


def check_widths(model: Model) -> None:
    """Compare the headers of a local model and of its adapter; the whole check needs torch.

    Raises:
        UserError: the adapter was made for a model of another size.
    """
    if model.adapter and model.is_local and not model.is_gguf:
        same_widths(adapter_folder(model), _folder(model.name))


def adapter_identity(model: Model) -> list[Any]:
    """What identifies the model's adapter, if it has one: its content, or hub id and revision."""
    if model.adapter is None:
        return []
    if model.adapter_is_local:
        return ["adapter", adapter_hash(adapter_folder(model))]
    return ["adapter", model.adapter, model.adapter_revision]


def local_gguf(model: Model) -> Path | None:
    """The model's GGUF file, if it is on this machine; the hub is not contacted."""
    folder = None if model.is_local else downloaded(model)
    file = folder / str(model.gguf_file) if folder else model.path
    return file if file.is_file() else None


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise UserError(f"No model in {name}: {_instead(folder, name)}.")
    return folder


def _instead(folder: Path, name: str) -> str:
    """What is in a folder without config.json, and what to write for it."""
    if (folder / CONFIG).is_file():
        base = read_config(folder / CONFIG).get("base_model_name_or_path") or "BASE"
        return f"it is an adapter; write model: {{name: {base}, adapter: {name}}}"
    if files := sorted(file.name for file in folder.glob("*.gguf")):
        return f"it has GGUF files; choose one, as in gguf_file: {files[0]}"
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "there is no such folder"
    hint = "; name a GGUF file by gguf_file: FILE" if "gguf" in name.lower() else ""
    return f"config.json is missing{hint}"


def _gguf(name: str) -> Path:
    file = Path(name).expanduser()
    if not file.is_file():
        owner, _, rest = name.partition("/")
        repository, _, inside = rest.partition("/")
        on_hub = inside and owner not in (".", "..", "~", "") and not Path(owner).exists()
        hint = f"{{name: {owner}/{repository}, gguf_file: {inside}}}"
        advice = f" If it is on the hub, write model: {hint}." if on_hub else ""
        raise UserError(f"No such GGUF file: {name}.{advice}")
    read_header(file)
    return file.absolute()


@lru_cache(maxsize=16)
def _inspected(folder: str) -> None:
    inspect(Path(folder))


def content_hash(model: Model) -> str:
    """Hash of all files that a local model is loaded from; for a GGUF file, its SHA-256."""
    if model.is_gguf:
        return file_hash(_gguf(str(model.path)))
    folder = _folder(model.name)
    inside = (folder, folder / "additional_chat_templates")
    files = [one for place in inside if place.is_dir() for one in os.scandir(place)]
    state = sorted((one.path, stamp(one.stat())) for one in files if one.is_file())
    return _folder_hash(folder, tuple(state))


@lru_cache(maxsize=16)
def _folder_hash(place: Path, _state: object) -> str:
    small = {p for pattern in SMALL for p in place.glob(pattern)}
    weights = [] if is_bare(place) else files_of(place)  # a prediction needs none; `fetch` does
    return digest([[p.name, file_hash(p)] for p in sorted({*small, *weights})])


def fetch(model: Model, *, weights: bool = True) -> Path:
    """The folder with the model's files, or its GGUF file; a hub model is downloaded first.

    Raises:
        UserError: missing, gated, unreachable or not a causal language model, in one sentence.
    """
    if model.is_local and model.is_gguf:
        return _gguf(str(model.path))
    if model.is_local:
        folder = _folder(model.name)
        _inspected(str(folder))
        return folder
    folder = _repository(model, weights=weights)
    if model.gguf_file:
        return _gguf(str(folder / model.gguf_file))
    if not (folder / "config.json").is_file():
        raise UserError(f"No model in {model.name}: {_instead(folder, model.name)}.")
    inspect(folder, weights=weights)
    return folder


def _repository(model: Model, *, weights: bool) -> Path:
    """The local copy of a hub model's repository, with the files that are needed."""
    return snapshot(model.name, model.revision, weights=weights, gguf_file=model.gguf_file)
