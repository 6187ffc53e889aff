"""What every component is: frozen settings with a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from backfire.errors import UserError, unknown


class Config(BaseModel):
    """Frozen settings: an unknown key is an error that names the nearest one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=False,
        allow_inf_nan=False,
    )

    @classmethod
    def make(cls, knobs: Mapping[str, Any], where: str = "") -> Self:
        """Validate `knobs`, turning what pydantic says into one sentence."""
        given = [str(key).replace("-", "_") for key in knobs]
        for key in given:
            if key not in cls.model_fields:
                raise unknown(f"key in {where or cls.label()}:", key, cls.model_fields)
            if given.count(key) > 1:  # once with a dash, once with an underscore
                raise UserError(f"{where or cls.label()}: the key '{key}' stands twice.")
        knobs = dict(zip(given, knobs.values(), strict=True))
        try:
            return cls.model_validate(knobs)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{where or cls.label()}: {place or 'value'}: {first['msg']} "
                f"(got {first['input']!r})."
            ) from None

    @classmethod
    def label(cls) -> str:
        return cls.__name__.lower()

    def changed(self) -> dict[str, Any]:
        """The knobs that differ from their defaults, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True)
class Preset:
    """Published values of a component's knobs, and where they stand."""

    source: str
    knobs: Mapping[str, Any]


class Component(Config):
    """Anything with a name in a recipe. Registered by `@register(name)` in a file of that name."""

    kind: ClassVar[str]
    name: ClassVar[str]
    version: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Preset]] = {}
    """Knobs as somebody published them, asked for by `{name: ..., preset: ...}`."""

    @classmethod
    def label(cls) -> str:
        return f"{cls.kind.removesuffix('s')} '{cls.name}'"

    def spec(self) -> dict[str, Any]:
        """What a recipe would say: the name and every knob that is not at its default."""
        return {"name": self.name, **self.changed()}

    def identity(self) -> dict[str, Any]:
        """What is hashed: the spec and the version of the behavior."""
        return {**self.spec(), "version": self.version}


def local_files(paths: str | Sequence[str]) -> list[Path]:
    """These paths, each of which must be a file."""
    files = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str) else paths)]
    for file in files:
        if not file.is_file():
            raise UserError(f"No such file: {file}.")
    return files
