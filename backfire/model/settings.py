"""The `model` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from backfire.base import Config


class Model(Config):
    """The language model to start from."""

    name: str = "sandbox"
    """`sandbox` (the embedded base), a folder, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights, and of all weights in evaluation. `auto`: on a GPU bfloat16, or
    float16 where it lacks that (T4, V100, RTX 20, GTX 16); float32 elsewhere; resolved once per run
    and part of the keys. Weights that are trained, or were by an alignment, are float32."""
    trust_remote_code: Literal[False] = False
    """Cannot be enabled: code that comes with a model is never run."""

    @field_validator("name")
    @classmethod
    def _is_a_place(cls, name: str) -> str:
        if not name.strip() or "://" in name:
            raise ValueError("`sandbox`, a folder or a hub id such as OWNER/NAME is needed")
        return name

    def spec(self) -> str | dict[str, Any]:
        """The entry in a recipe: the bare name, if nothing else is set."""
        rest = {key: value for key, value in self.changed().items() if key != "name"}
        return {"name": self.name, **rest} if rest else self.name

    @property
    def is_folder(self) -> bool:
        return self.name.startswith((".", "/", "~")) or Path(self.name).is_dir()

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub; None for the embedded base and for a folder."""
        return None if self.name == "sandbox" or self.is_folder else self.name
