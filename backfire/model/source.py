"""Locates a model's files and identifies their exact content. Imports no torch."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from backfire.data.gguf import read_header
from backfire.data.snapshot import SMALL, snapshot
from backfire.data.weights import files_of, inspect
from backfire.errors import UserError
from backfire.model.settings import Model
from backfire.store import digest, sha256

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(model: Model, *, ask: bool = True) -> Model:
    """The model at the commit that its revision points to now. A run resolves it once, so a branch
    that moves later changes nothing, and the key covers the commit. With `ask=False` the hub is not
    contacted: the commit is the last downloaded one, if any.

    Raises:
        UserError: as `fetch`.
    """
    if not model.on_hub or _COMMIT.fullmatch(model.revision or ""):
        return model
    folder = _repository(model, weights=model.is_gguf) if ask else downloaded(model)
    commit = folder.name if folder else ""  # the hub's cache names snapshots by their commit
    return model.model_copy(update={"revision": commit}) if _COMMIT.fullmatch(commit) else model


def downloaded(model: Model) -> Path | None:
    """The local folder of a downloaded hub model, or None; the hub is not contacted."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        name = model.gguf_file or "config.json"
        file = try_to_load_from_cache(model.name, name, revision=model.revision)
    except HFValidationError:
        return None
    return Path(file.removesuffix(name)) if isinstance(file, str) else None


def local_gguf(model: Model) -> Path | None:
    """The model's GGUF file, if it is on this machine; the hub is not contacted."""
    folder = None if model.is_local else downloaded(model)
    file = folder / str(model.gguf_file) if folder else model.path
    return file if file.is_file() else None


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise UserError(f"No model in {name}: {_instead(folder)}.")
    return folder


def _instead(folder: Path) -> str:
    """What is in a folder without config.json."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter; merge it into its base"
    if files := sorted(file.name for file in folder.glob("*.gguf")):
        return f"it has GGUF files; choose one, as in gguf_file: {files[0]}"
    return "config.json is missing"


def _gguf(name: str) -> Path:
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"No such GGUF file: {name}.")
    read_header(file)
    return file.absolute()


@lru_cache(maxsize=16)
def _inspected(folder: str) -> None:
    inspect(Path(folder))


def content_hash(model: Model) -> str:
    """Hash of all files that a local model is loaded from; for a GGUF file, its SHA-256."""
    if model.is_gguf:
        return gguf_hash(_gguf(str(model.path)))
    return _folder_hash(str(_folder(model.name)))


def gguf_hash(file: Path) -> str:
    """SHA-256 of a GGUF file."""
    state = file.stat()
    return _file_hash(str(file), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16)
def _file_hash(file: str, _size: int, _changed: int) -> str:
    return sha256(Path(file))


@lru_cache(maxsize=16)
def _folder_hash(folder: str) -> str:
    small = {p for pattern in SMALL for p in Path(folder).glob(pattern)}
    return digest([[p.name, sha256(p)] for p in sorted({*small, *files_of(Path(folder))})])


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
    inspect(folder, weights=weights)
    return folder


def _repository(model: Model, *, weights: bool) -> Path:
    """The local copy of a hub model's repository, with the files that are needed."""
    return snapshot(model.name, model.revision, weights=weights, gguf_file=model.gguf_file)
