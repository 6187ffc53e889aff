"""Locates a model's files and identifies their exact content. Imports no torch."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

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
    if not model.hub_id or _COMMIT.fullmatch(model.revision or ""):
        return model
    folder = fetch(model, weights=False) if ask else downloaded(model)
    commit = folder.name if folder else ""  # the hub's cache names snapshots by their commit
    return model.model_copy(update={"revision": commit}) if _COMMIT.fullmatch(commit) else model


def downloaded(model: Model) -> Path | None:
    """The local folder of a downloaded hub model, or None; the hub is not contacted."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        why = "it is an adapter; merge it into its base" if adapter else "config.json is missing"
        raise UserError(f"No model in {name}: {why}.")
    return folder


@lru_cache(maxsize=16)
def _inspected(folder: str) -> None:
    inspect(Path(folder))


def content_hash(model: Model) -> str:
    """Hash of all files that a model in a local folder is loaded from."""
    return _folder_hash(str(_folder(model.name)))


@lru_cache(maxsize=16)
def _folder_hash(folder: str) -> str:
    small = {p for pattern in SMALL for p in Path(folder).glob(pattern)}
    return digest([[p.name, sha256(p)] for p in sorted({*small, *files_of(Path(folder))})])


def fetch(model: Model, *, weights: bool = True) -> Path:
    """The folder with the model's files; a hub model is downloaded first.

    Raises:
        UserError: missing, gated, unreachable or not a causal language model, in one sentence.
    """
    if model.is_folder:
        folder = _folder(model.name)
        _inspected(str(folder))
        return folder
    folder = snapshot(model.name, model.revision, weights=weights)
    inspect(folder, weights=weights)
    return folder
