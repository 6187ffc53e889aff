"""Downloads model files from the hub. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from backfire.data.weights import INDEX, SINGLE, read_config
from backfire.errors import UserError

SMALL = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
"""Everything but weights."""


def snapshot(
    name: str, revision: str | None, *, weights: bool = True, gguf_file: str | None = None
) -> Path:
    """The local folder with a hub model's files; of its weights only those that transformers reads.

    Raises:
        UserError: missing, gated or unreachable, in one sentence.
    """
    if gguf_file:
        folder = _download(name, revision, [gguf_file])
        if not (folder / gguf_file).is_file():
            raise UserError(f"No file {gguf_file} in the repository {name}.")
        return folder
    folder = _download(name, revision, SMALL)
    if not weights:
        return folder
    index = folder / INDEX
    named = set(read_config(index).get("weight_map", {}).values()) if index.is_file() else ()
    return _download(name, revision, [*SMALL, *(named or (SINGLE,))])


def snapshot_adapter(name: str, revision: str | None) -> Path:
    """The local folder with the files of a PEFT adapter on the hub.

    Raises:
        UserError: as `snapshot`.
    """
    patterns = ["adapter_config.json", "adapter_model.safetensors"]
    return _download(name, revision, patterns, "adapter")


def _download(
    name: str, revision: str | None, patterns: Sequence[str], what: str = "model"
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, ValueError, OSError) as error:
        is_absent = isinstance(error, LocalEntryNotFoundError)
        response = getattr(error.__cause__ if is_absent else error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, HFValidationError):
            problem = f"'{name}' is no {what}: neither a path on this machine nor a hub id."
        elif isinstance(error, GatedRepoError):
            problem = f"The {what} '{name}' is gated: request access at {page} and set HF_TOKEN."
        elif isinstance(error, RepositoryNotFoundError):
            problem = (
                f"No {what} '{name}': there is no such folder and no such page as {page} "
                "(if it is private or gated, set HF_TOKEN)."
            )
        elif status in (401, 403):
            access = f"request it at {page} and set HF_TOKEN"
            problem = f"No access to the {what} '{name}' ({status}): {access}."
        elif is_absent:
            offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")
            why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            problem = (
                f"The {what} '{name}' is not on this machine and {why} ({page}); "
                "a folder with a copy can be named instead."
            )
        else:
            reason = str(error).splitlines()[0]
            problem = f"The {what} '{name}' cannot be fetched from {page}: {reason}"
        raise UserError(problem) from None
