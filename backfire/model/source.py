"""Where a model's files are, and what names its exact content. No torch here."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfire.data.snapshot import SMALL, snapshot
from backfire.data.weights import files_of, inspect
from backfire.errors import UserError
from backfire.model.types import types_here

if TYPE_CHECKING:
    from backfire.experiment import Model

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(model: Model, *, ask: bool = True) -> Model:
    """The same model at the commit that its revision names now. The hub is asked once for a run:
    a branch that moves on while it goes on changes nothing, and the key covers the commit. Without
    `ask`, the commit is the one that was downloaded last, if any.

    Raises:
        UserError: as `fetch`.
    """
    if model.name == "sandbox" or model.is_folder or _COMMIT.fullmatch(model.revision or ""):
        return model
    folder = fetch(model, weights=False) if ask else downloaded(model)
    commit = folder.name if folder else ""  # the hub's cache names snapshots by their commit
    return model.model_copy(update={"revision": commit}) if _COMMIT.fullmatch(commit) else model


def downloaded(model: Model) -> Path | None:
    """Where the hub's model is on this machine, if it is; nothing is asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def base_key(model: Model) -> str:
    """The key of an untuned model: pre-training knobs, file contents, or hub id and revision."""
    from backfire.experiment import digest

    dtype: Any = types_here().dtype if model.dtype == "auto" else model.dtype
    if dtype == "bfloat16":  # 2: what is trained or was aligned as a whole starts from float32
        dtype = [dtype, 2]
    if model.name == "sandbox":
        return digest(["sandbox", sandbox_key(), dtype])
    if model.is_folder:
        return digest(["folder", _folder_hash(str(_folder(model.name))), dtype])
    return digest(["hub", model.name, model.revision, dtype])


def sandbox_key() -> str:
    """The embedded base: its world and how it is pre-trained, in which type of products too."""
    from backfire.experiment import TRAINING, digest
    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.world import VERSION

    how = [Pretrain().model_dump(mode="json"), TRAINING, types_here().compute]
    return digest([*how, VERSION])


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


@lru_cache(maxsize=16)
def _folder_hash(folder: str) -> str:
    """Covers every byte of the files that the model is loaded from."""
    from backfire.experiment import digest
    from backfire.store import sha256

    small = {p for pattern in SMALL for p in Path(folder).glob(pattern)}
    return digest([[p.name, sha256(p)] for p in sorted({*small, *files_of(Path(folder))})])


def fetch(model: Model, *, weights: bool = True) -> Path:
    """The folder with the files of a hub id or local folder; a hub model is downloaded first.

    Raises:
        UserError: missing, gated, unreachable or no causal language model, in one sentence.
    """
    if model.is_folder:
        folder = _folder(model.name)
        _inspected(str(folder))
        return folder
    folder = snapshot(model.name, model.revision, weights=weights)
    inspect(folder, weights=weights)
    return folder
