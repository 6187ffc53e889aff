"""Base classes of settings and components: frozen pydantic models with readable errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from backfire.errors import UserError, no_file, shortened, unknown
from backfire.other_names import hint
from backfire.plugins import Plugin


class Config(BaseModel):
    """Frozen settings; an unknown key is an error that suggests the nearest valid one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=False,
        allow_inf_nan=False,
    )

    moved: ClassVar[Mapping[str, str]] = {}
    """Former knobs, each with a sentence on what to write instead."""

    @classmethod
    def make(cls, knobs: Mapping[str, Any], where: str = "") -> Self:
        """Validate `knobs`, turning pydantic's error into one sentence that begins with `where`."""
        where = where or cls.label()
        if not isinstance(knobs, Mapping):
            raise UserError(f"{where}: settings are needed, as in {{setting: value}}.")
        keys = [str(key).replace("-", "_") for key in knobs]
        for key in keys:
            if key in cls.moved:
                raise UserError(f"{where}: {key} is no longer a setting. {cls.moved[key]}")
            if key not in cls.model_fields:
                place = where if where.startswith("align.") else cls.place()
                other = hint(key, cls.model_fields, place)
                raise unknown(f"key in {where}:", key, cls.model_fields, other)
            if keys.count(key) > 1:  # once with a dash, once with an underscore
                raise UserError(f"{where}: duplicate key '{key}'.")
        knobs = dict(zip(keys, knobs.values(), strict=True))
        for key, value in knobs.items():
            if isinstance(value, bool) and _is_number(cls.model_fields[key].annotation):
                raise UserError(f"{where}: {key}: a number is needed (got {value}).")
        try:
            return cls.model_validate(knobs)
        except ValidationError as error:
            raise UserError(f"{where}: {_why(error.errors())}.") from None

    @classmethod
    def label(cls) -> str:
        return cls.__name__.lower()

    @classmethod
    def place(cls) -> str | None:
        """The part of a recipe that holds these settings; empty: the whole; None: no part of it."""
        return cls.__name__.lower()

    def changed(self) -> dict[str, Any]:
        """The knobs that differ from their defaults, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)


_WANTED = {
    "dict_type": "pairs are needed, as in {key: value}",
    "tuple_type": "a list is needed, as in [a, b]",
    "list_type": "a list is needed, as in [a, b]",
}
_ONE = {f"{kind}_type" for kind in ("string", "int", "float", "bool", "model")} | {"literal_error"}
_SETTINGS = ("Train", "Align", "Safety", "Evaluation")
_BRANCH = re.compile(r"str|int|float|bool|(list|tuple|dict)\[.*")
"""How pydantic names the part of `str | list[str]` that it tried."""


def _is_number(annotation: Any) -> bool:
    """Whether a setting is a number and not a truth value, which Python would read as 0 or 1."""
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


def _why(errors: Sequence[ErrorDetails]) -> str:
    """The first invalid value: its place, what is wrong, the value, and a hint where one fits."""
    same = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    error = max(same, key=lambda one: len(one["loc"]))
    kind, value = error["type"], error["input"]
    problem = error["msg"].removeprefix("Value error, ").rstrip(".")
    place = ".".join(str(part) for part in error["loc"] if not _BRANCH.fullmatch(str(part)))
    if kind in ("model_type", "model_attributes_type"):
        name = error.get("ctx", {}).get("class_name", "")
        problem = f"one {name.lower()} is needed, by its name or as {{name: ..., setting: value}}"
        if name in _SETTINGS:
            problem = "settings are needed, as in {setting: value}"
    elif kind in _WANTED:
        problem = _WANTED[kind]
    got = f"(got {shortened(repr(value))}){_hint(kind, value)}"
    if kind == "value_error" and not place:
        return problem  # settings that do not fit together
    return f"{shortened(place) or 'value'}: {problem} {got}"


def _hint(kind: str, value: Any) -> str:
    if isinstance(value, list) and kind in _ONE:
        return "; several values to try go under matrix"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"; put it in quotes if it is meant as text: '\"{str(value).lower()}\"'"
    if kind == "string_type" and isinstance(value, dict):
        return "; put text that holds ': ' in quotes"
    if kind == "float_parsing" and re.fullmatch(r"\s*\d+,\d+\s*", str(value)):
        return "; write decimals with a point"
    if kind in ("float_parsing", "int_parsing") and str(value).rstrip().endswith("%"):
        return "; write a share, such as 0.05 for 5 %"
    return ""


@dataclass(frozen=True)
class Preset:
    """Published values of a component's knobs, and their source."""

    source: str
    knobs: Mapping[str, Any]


class Component(Config):
    """A named part of a recipe, registered by `@register(name)` in a file of that name."""

    kind: ClassVar[str]
    name: ClassVar[str]
    version: ClassVar[int] = 1
    plugin: ClassVar[Plugin | None] = None
    """Where it comes from, if it is not part of this package."""
    presets: ClassVar[Mapping[str, Preset]] = {}
    """Published values of the knobs, selected by `{name: ..., preset: ...}`."""

    @classmethod
    def label(cls) -> str:
        return f"{cls.kind.removesuffix('s')} '{cls.name}'"

    @classmethod
    def place(cls) -> str:
        return "data" if cls.kind == "datasets" else cls.kind.removesuffix("s")

    def spec(self) -> dict[str, Any]:
        """The entry in a recipe: the name and every knob that is not at its default."""
        return {"name": self.name, **self.changed()}

    def identity(self) -> dict[str, Any]:
        """The hashed content: the spec, the version of the behavior, and the code of a plug-in."""
        code = {"plugin": self.plugin.sha256} if self.plugin else {}
        return {**self.spec(), "version": self.version, **code}


def local_files(paths: str | Sequence[str]) -> list[Path]:
    """The paths as files that exist.

    Raises:
        UserError: a path is a URL, a folder or no file.
    """
    files = [Path(path).expanduser() for path in ([paths] if isinstance(paths, str) else paths)]
    for file in files:
        if "://" in str(paths):
            raise UserError(f"'{shortened(paths)}' is a URL; download the file and give its path.")
        if file.is_dir():
            raise UserError(f"'{file}' is a folder; give the path of a file in it.")
        if not file.is_file():
            raise no_file(file)
    return files
