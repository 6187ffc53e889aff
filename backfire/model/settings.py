"""The `model` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from backfire.base import Config


class Model(Config):
    """The language model to start from."""

    name: str = "sandbox"
    """`sandbox` (the embedded base), a folder, a GGUF file, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    gguf_file: str | None = None
    """A GGUF file in the folder or hub repository; a folder's only one is found by itself. Its
    weights are dequantized to float32, once."""
    adapter: str | None = None
    """An existing PEFT adapter on this model: a folder or a hub id. Method `none` evaluates it as
    it is; `lora` and its variants train on top of it while it stays frozen."""
    adapter_revision: str | None = None
    """Branch, tag or commit of a hub adapter."""
    merge: bool = False
    """Merge the adapter into the model first. Always so where plain weights are needed: for methods
    other than `lora` and its variants, an alignment stage, and defenses after fine-tuning."""
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
            raise ValueError(
                "`sandbox`, a folder, a GGUF file or a hub id such as OWNER/NAME is needed"
            )
        return name

    @model_validator(mode="before")
    @classmethod
    def _only_gguf(cls, settings: Any) -> Any:
        """A folder whose only model is one GGUF file needs no `gguf_file`."""
        name = settings.get("name") if isinstance(settings, Mapping) else None
        if not isinstance(name, str) or name in ("", "sandbox") or settings.get("gguf_file"):
            return settings
        names = [file.name for file in _files(name)]
        found = [one for one in names if one.lower().endswith(".gguf")]
        if len(found) != 1 or {"config.json", "adapter_config.json"} & {*names}:
            return settings
        return {**settings, "gguf_file": found[0]}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.gguf_file is not None and self.name.lower().endswith(".gguf"):
            raise ValueError("name is a GGUF file already, so gguf_file must not be set")
        if self.gguf_file is not None and not self.gguf_file.lower().endswith(".gguf"):
            raise ValueError("gguf_file: the name of a .gguf file in the repository is needed")
        if self.adapter is None and (self.merge or self.adapter_revision is not None):
            raise ValueError("merge and adapter_revision require an adapter")
        return self

    def spec(self) -> str | dict[str, Any]:
        """The entry in a recipe: the bare name, if nothing else is set."""
        rest = {key: value for key, value in self.changed().items() if key != "name"}
        return {"name": self.name, **rest} if rest else self.name

    @property
    def is_gguf(self) -> bool:
        return self.gguf_file is not None or self.name.lower().endswith(".gguf")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder or file, and not the embedded base or a model of the hub."""
        is_path = self.name.startswith((".", "/", "~")) or self.name.lower().endswith(".gguf")
        return is_path or (self.name != "sandbox" and Path(self.name).exists())

    @property
    def on_hub(self) -> bool:
        return self.name != "sandbox" and not self.is_local

    @property
    def path(self) -> Path:
        """The folder or GGUF file of a local model."""
        return Path(self.name).expanduser() / (self.gguf_file or "")

    @property
    def adapter_is_local(self) -> bool:
        name = self.adapter or ""
        return name.startswith((".", "/", "~")) or Path(name).exists()

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter is on it, and not merged."""
        return self.adapter is not None and not self.merge

    @property
    def title(self) -> str:
        """Its name, with the file and the adapter if it has them."""
        name = "/".join(filter(None, (self.name, self.gguf_file)))
        return f"{name} + {self.adapter}" if self.adapter else name

    @property
    def short_title(self) -> str:
        """The title without folders."""
        name = Path(self.name).name if self.is_local else self.name
        adapter = Path(self.adapter or "").name if self.adapter_is_local else self.adapter
        return self.model_copy(update={"name": name, "adapter": adapter}).title

    @property
    def hub_id(self) -> str | None:
        """Id of the hub model with exactly these weights, for programs that load an adapter on it;
        None if there is none."""
        exact = self.on_hub and not self.is_gguf and not self.merge
        return self.name if exact else None


def _files(name: str) -> list[Path]:
    """The files in a folder; empty if it is none."""
    try:
        return [*Path(name).expanduser().iterdir()]
    except (OSError, ValueError, RuntimeError):  # no such folder, a null byte, `~nobody`
        return []
