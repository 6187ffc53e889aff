"""What may be given in the place of a recipe: data, weights, or a folder."""

from __future__ import annotations

from pathlib import Path

from backfire.errors import UserError

_DATA = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def refuse_other(path: Path) -> None:
    """Refuse what is there but is no recipe.

    Raises:
        UserError: it is a folder, or a file of data or of weights.
    """
    kind, suffix = "", Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in _DATA or (suffix == ".json" and _begins_with(path, "[")):
        kind = f"a data file: a recipe names it, as in `data: {{name: files, train: {path.name}}}`"
    elif suffix in _WEIGHTS:
        kind = f"a file of weights: a recipe names a model, as in `model: {path.name}`"
    elif any((path / name).exists() for name in ("jobs.json", "run.json", "cells")):
        kind = f"the folder of a run: `backfire status {path}` shows it"
    elif any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        kind = f"the folder of a model: a recipe names it, as in `model: {path}`"
    elif path.is_dir():
        kind = "a folder: give the path of a recipe in it"
    if kind and path.exists():
        raise UserError(f"{path} is no recipe, but {kind}.")


def _begins_with(path: Path, sign: str) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(1000).lstrip("\ufeff \t\r\n").startswith(sign)
    except (OSError, UnicodeDecodeError):
        return False
