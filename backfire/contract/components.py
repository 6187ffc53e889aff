"""The contract of all components: name, docstrings, settings and identity."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError

from backfire.base import Component, Config, Dataset
from backfire.base.docstrings import documented
from backfire.errors import UserError
from backfire.registry import build, find

_PATHS = ("train", "test")
"""Knobs of data sets that name a file; `fingerprint` covers its content instead."""


def is_named(cls: type[Component]) -> str | None:
    """It is found by its name, and its version is a whole number from 1"""
    if find(cls.kind, cls.name) is not cls:
        return f"'{cls.name}' is another class"
    is_version = isinstance(cls.version, int) and cls.version >= 1
    return None if is_version else f"the version is {cls.version!r}"


def is_described(cls: type[Component]) -> str | None:
    """Its docstring starts with a sentence, which `backfire list` shows"""
    doc = (cls.__dict__.get("__doc__") or "").strip()
    opens = doc[:1].isupper() or doc[:1].isdigit()
    return None if opens and doc.endswith((".", ")")) else f"the docstring is {doc[:60]!r}"


def describes_its_knobs(cls: type[Component]) -> str | None:
    """Every setting has a docstring: what it does, its unit, its range"""
    fields = documented(cls).model_fields
    bare = [knob for knob, info in fields.items() if not (info.description or "").strip()]
    return f"no docstring under {', '.join(bare)}" if bare else None


def has_valid_defaults(cls: type[Component]) -> str | None:
    """It can be built without settings, its defaults are valid, and it is immutable"""
    component = _default(cls)
    if component.spec() != {"name": cls.name}:
        return f"with no setting given, its spec is {component.spec()}"
    # `validate_default` is off for speed, so here the defaults themselves are checked.
    try:
        if cls.make(component.model_dump()) != component:
            return "its defaults, set explicitly, give another component"
    except UserError as error:
        return f"a default is invalid: {error}"
    try:
        component.anything = 1  # type: ignore[attr-defined]
    except ValidationError:
        return None
    return "an attribute can be set"


def has_an_identity(cls: type[Component]) -> str | None:
    """Every setting is part of its identity and survives YAML"""
    plain = _default(cls)
    kept_out = _PATHS if isinstance(plain, Dataset) else getattr(plain, "unhashed", ())
    if (cls.plugin.sha256 if cls.plugin else None) != plain.identity().get("plugin"):
        return "`identity` leaves out the plug-in; add to super().identity()"
    for knob in cls.model_fields:
        changed = build(cls.kind, {"name": cls.name, knob: other_value(cls, knob)})
        if knob not in kept_out and changed.identity() == plain.identity():
            return f"another value of {knob} has the same identity"
        again = build(cls.kind, yaml.safe_load(yaml.safe_dump(changed.spec())))
        if (again, again.identity()) != (changed, changed.identity()):
            return f"{knob} changes when written to YAML and read"
    return None


def knows_misspelled_knobs(cls: type[Component]) -> str | None:
    """A misspelled setting is an error that suggests the nearest one"""
    for knob in cls.model_fields:
        try:
            cls.make({f"{knob}x": 1})
        except UserError as error:
            if f"Unknown key in {cls.label()}:" in str(error) and "did you mean" in str(error):
                continue
        return f"{knob}x is not refused"
    return None


def other_value(cls: type[Config], knob: str) -> Any:
    """A valid value of any type that is not the default.

    Raises:
        LookupError: there is none; add one with `Field(examples=[...])`.
    """
    field = cls.model_fields[knob]
    default = field.get_default(call_default_factory=True)
    tries: list[Any] = [*(field.examples or ()), *([not default] * isinstance(default, bool))]
    if isinstance(default, int | float) and not isinstance(default, bool):
        tries += [default + 1, default + 0.5]
    tries += [{"name": "sandbox-sums"}, {"name": "lexicon"}, "other", ["other"], 3]
    tries += [{"text": "other"}, ["a", "b"], {"a": "b", "b": "c"}, "other {code}", [7], 0.5, True]
    schema = cls.model_json_schema()
    tries += _choices([schema["properties"][knob], schema.get("$defs", {})])
    for value in tries:
        try:
            changed = cls.make({knob: value})
        except (UserError, ValidationError):
            continue
        if getattr(changed, knob) != default:
            return value
    raise LookupError(f"no other value for {knob} to try; add one with Field(examples=[...])")


def _choices(schema: Any) -> list[Any]:
    """Every enumerated value in the schema, alone and in a list."""
    if isinstance(schema, dict):
        own = [form for value in schema.get("enum", ()) for form in (value, [value])]
        return own + _choices(list(schema.values()))
    if isinstance(schema, list):
        return [value for item in schema for value in _choices(item)]
    return []


def _default(cls: type[Component]) -> Any:
    return build(cls.kind, cls.name)
