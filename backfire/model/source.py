"""Where a model's files are, and what names its exact content. No torch here."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from backfire.errors import UserError

if TYPE_CHECKING:
    from backfire.experiment import Model

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SMALL = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")


def base_key(model: Model) -> str:
    """The key of an untuned model: pre-training knobs, file contents, or hub id and revision."""
    from backfire.experiment import digest

    if model.name == "sandbox":
        return digest(["sandbox", sandbox_key(), model.dtype])
    if model.is_folder:
        return digest(["folder", _folder_hash(str(_folder(model.name))), model.dtype])
    return digest(["hub", model.name, model.revision, model.dtype])


def sandbox_key() -> str:
    """The embedded base: its world and how it is pre-trained."""
    from backfire.experiment import digest
    from backfire.sandbox.base import Pretrain
    from backfire.sandbox.world import VERSION

    return digest([Pretrain().model_dump(mode="json"), VERSION])


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise UserError(f"No model in {name}: config.json is missing.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"No model in {name}: there is no .safetensors file (other formats are not loaded)."
        )
    return folder


@lru_cache(maxsize=16)
def _folder_hash(folder: str) -> str:
    """Covers every byte of the model's files."""
    from backfire.experiment import digest
    from backfire.store import sha256

    files = sorted({p for pattern in _WEIGHTS + _SMALL for p in Path(folder).glob(pattern)})
    return digest([[p.name, sha256(p)] for p in files])


def _refused(name: str, status: int) -> str:
    page = f"https://huggingface.co/{name}"
    return f"The hub refuses the model '{name}' ({status}): ask for access at {page}, set HF_TOKEN."


def fetch(model: Model, *, weights: bool = True) -> Path:
    """The folder with the files of a hub id or local folder; a hub model is downloaded first.

    Raises:
        UserError: missing, gated or unreachable, in one sentence.
    """
    if model.is_folder:
        return _folder(model.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{model.name}"
    try:
        patterns = [*_SMALL, *(_WEIGHTS if weights else ())]
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"The model '{model.name}' is gated: ask for access at {page} and set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"No model '{model.name}': there is no such folder and no such page as {page} "
            "(if it is private or gated, set HF_TOKEN)."
        ) from None
    except LocalEntryNotFoundError as error:
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(_refused(model.name, status)) from None
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise UserError(
            f"The model '{model.name}' is not on this machine and {why} ({page})."
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(_refused(model.name, status)) from None
        raise UserError(
            f"The model '{model.name}' cannot be fetched from {page}: {str(error).splitlines()[0]}"
        ) from None
