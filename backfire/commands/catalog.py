"""Lists and describes components and recipes, from the registry and the docstrings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_origin

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from rich.console import Console

from backfire import recipe as recipes
from backfire.base import Component, Config
from backfire.base.docstrings import documented, leaves
from backfire.errors import UserError, unknown
from backfire.experiment import Align, Evaluation, Model, Safety, Train
from backfire.registry import KINDS, find, names, use_installed
from backfire.store import write_atomic
from backfire.terminal import fitted, say

_SENTENCE = re.compile(r"(?<=[a-z)]\.)(?<! al\.)\s")
_CITATION = re.compile(r"\s*\([^()]*(?:arXiv|\d{4}\.\d{5}|\b(?:19|20)\d\d\b)[^()]*\)")


def print_list(kind: str | None, console: Console | None = None) -> None:
    """Print the components and recipes of one kind or of all kinds, one per line, and a sentence
    for each installed plug-in that cannot be used.

    Raises:
        UserError: the kind is unknown.
    """
    kinds = (*KINDS, "recipes")
    if kind is not None and kind not in kinds:
        raise unknown("kind", kind, kinds)
    console, problems = console or Console(), use_installed()
    for line in lines([kind] if kind else kinds):
        console.file.write(f"{fitted(line, console)}\n")
    for problem in problems:
        say(problem, console)


def print_explained(name: str) -> None:
    """Print a component's documentation, wrapped in a terminal, or a recipe verbatim."""
    console, whole = Console(), explain(name)
    if not (console.is_terminal and kinds_of(name)):
        console.file.write(f"{whole}\n")
        return
    for line in whole.splitlines():
        say(line, console, line[: len(line) - len(line.lstrip())])


def print_schema(out: Path | None) -> None:
    """Print the JSON Schema of recipes, or write it to a file."""
    whole = json.dumps(json_schema(), indent=1) + "\n"
    if out:
        write_atomic(out, whole)
    else:
        Console().file.write(whole)


def lines(kinds: Iterable[str]) -> list[str]:
    """A line per component: name and the first sentence of its docstring without citations."""
    out = []
    for kind in kinds:
        if kind == "recipes":
            shown = {name: _question(name) for name in recipes.shipped() if name[0] != "_"}
        else:
            shown = {name: _first_sentence(kind, name) for name in names(kind)}
        width = max(map(len, shown))
        out += [kind, *(f"  {name:{width}}  {sentence}" for name, sentence in shown.items())]
    return out


def _first_sentence(kind: str, name: str) -> str:
    cls = find(kind, name)
    sentence = _CITATION.sub("", _SENTENCE.split(" ".join((cls.__doc__ or "").split()))[0])
    return f"[{cls.plugin.title}] {sentence}" if cls.plugin else sentence


def _question(name: str) -> str:
    text = recipes.read(name)[1]
    return next(
        (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), ""
    )


def explain(name: str) -> str:
    """The docstrings and settings of the components of this name, and the text of the recipe."""
    problems = [] if kinds_of(name) else use_installed()
    found = [describe(kind, name) for kind in kinds_of(name)]
    if name in recipes.shipped():
        head = f"recipe '{name}'\n\n" if found else ""
        found.append(head + recipes.read(name)[1].rstrip())
    if found:
        return "\n\n".join(found)
    shipped = [name for name in recipes.shipped() if not name.startswith("_")]
    error = unknown("name", name, {*(item for kind in KINDS for item in names(kind)), *shipped})
    raise UserError(" ".join([str(error), *problems]))


def describe(kind: str, name: str) -> str:
    """The documentation of a component, from its docstrings, for `backfire show`."""
    cls = find(kind, name)
    origin = f", from {cls.plugin.title}" if cls.plugin else ""
    title = f"{cls.label()} (version {cls.version}{origin})"
    lines = [title, "", inspect.cleandoc(cls.__doc__ or ""), ""]
    for knob, info in documented(cls).model_fields.items():
        value = f"= {info.get_default(call_default_factory=True)!r}"
        default = "required" if info.is_required() else value
        lines += [f"  {knob} {default}", f"      {' '.join((info.description or '').split())}"]
    if cls.presets:
        lines += ["", f"Presets, as in {{name: {cls.name}, preset: {next(iter(cls.presets))}}}:"]
    for preset, published in cls.presets.items():
        knobs = ", ".join(f"{knob}={value}" for knob, value in published.knobs.items())
        lines += [f"  {preset}: {published.source}", f"      {knobs}"]
    return "\n".join(lines)


def kinds_of(name: str) -> list[str]:
    """The kinds that have a component of this name."""
    return [kind for kind in KINDS if name.replace("_", "-") in names(kind)]


def _one_or_more(kind: str) -> list[Any]:
    one = {"$ref": f"#/$defs/{kind}"}
    return [one, {"type": "array", "items": one}]


def _settings(cls: type[Config], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a group of settings; the types that it refers to go into `definitions`."""
    own = {
        name: {"description": field.description or "", **_values(field, definitions)}
        for name, field in documented(cls).model_fields.items()
    }
    return {"type": "object", "additionalProperties": False, "properties": own}


def _values(field: FieldInfo, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one setting: a component (or several, or none) of its kind, or a plain
    value."""
    inner = leaves(field.annotation)
    for leaf in inner:
        if isinstance(leaf, type) and issubclass(leaf, Component):
            several = get_origin(field.annotation) is tuple
            options = _one_or_more(leaf.kind) if several else _one_or_more(leaf.kind)[:1]
            return {"anyOf": [*options, *([{"type": "null"}] if type(None) in inner else [])]}
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    shape = adapter.json_schema(ref_template="#/$defs/{model}")
    definitions |= shape.pop("$defs", {})
    return shape


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file."""
    use_installed()
    definitions: dict[str, Any] = {}
    for kind in KINDS:
        options: list[Any] = [{"enum": [*names(kind), *(["none"] if kind == "attacks" else [])]}]
        for name in names(kind):
            shape = documented(find(kind, name)).model_json_schema(
                ref_template=f"#/$defs/{kind}-{name}-{{model}}"
            )
            for inner, value in shape.pop("$defs", {}).items():
                definitions[f"{kind}-{name}-{inner}"] = value
            presets = find(kind, name).presets
            preset = {"preset": {"enum": [*presets]}} if presets else {}
            own = shape.get("properties", {})
            shape["properties"] = {"name": {"const": name}, **preset, **own}
            shape["required"] = ["name", *shape.get("required", [])]
            definitions[f"{kind}-{name}"] = shape
            options.append({"$ref": f"#/$defs/{kind}-{name}"})
        definitions[kind] = {"anyOf": options}
    align, safety = _settings(Align, definitions), _settings(Safety, definitions)
    settings = {
        "model": {"anyOf": [{"type": "string"}, documented(Model).model_json_schema()]},
        "data": {"$ref": "#/$defs/datasets"},
        "template": {"$ref": "#/$defs/templates"},
        "attack": {"$ref": "#/$defs/attacks"},
        "method": {"$ref": "#/$defs/methods"},
        "defense": {"anyOf": [{"const": "none"}, *_one_or_more("defenses")]},
        "align": {"anyOf": [{"type": "null"}, align]},
        "safety": {"anyOf": [{"type": "null"}, safety]},
        "train": documented(Train).model_json_schema(),
        "evaluation": documented(Evaluation).model_json_schema(),
        "metrics": {"anyOf": _one_or_more("metrics")},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    }
    rules = {"type": "array", "items": {"type": "object"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "backfire recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **settings,
            "matrix": {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
            "include": rules,
            "exclude": rules,
            "profiles": {"type": "object", "additionalProperties": {"type": "object"}},
        },
        "$defs": definitions,
    }
