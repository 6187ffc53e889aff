"""Finds a component by importing the file of the same name.

`attacks/badnets.py` holds `@register("badnets") class BadNets(Attack)`. There is no list to edit:
the names of a kind are the file names in its folder, and nothing is imported until needed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from backfire.errors import UserError, shortened, unknown

if TYPE_CHECKING:
    from backfire.base import Component

KINDS = ("attacks", "methods", "defenses", "metrics", "judges", "datasets", "templates")

C = TypeVar("C", bound="type[Component]")


def register(name: str, *, version: int = 1) -> Callable[[C], C]:
    """Name a component class. Raise `version` whenever its behavior or a default changes."""

    def mark(cls: C) -> C:
        file = cls.__module__.rpartition(".")[2].replace("_", "-")
        if cls.__module__.startswith("backfire.") and file != name:
            raise TypeError(f"component '{name}' must live in a file of its own name, not '{file}'")
        cls.name, cls.version = name, version
        return cls

    return mark


def names(kind: str) -> list[str]:
    """All names of a kind, sorted; only the package is imported."""
    package = importlib.import_module(f"backfire.{kind}")
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def find(kind: str, name: str) -> type[Component]:
    """The class of this name; the error for an unknown name suggests the nearest one."""
    wanted = name.replace("_", "-")
    if wanted not in names(kind):
        raise unknown(kind.removesuffix("s"), name, names(kind))
    module = importlib.import_module(f"backfire.{kind}.{wanted.replace('-', '_')}")
    for item in vars(module).values():
        own = isinstance(item, type) and item.__module__ == module.__name__
        if own and getattr(item, "name", None) == wanted:
            return cast("type[Component]", item)
    raise TypeError(f'{module.__name__} has no class marked @register("{wanted}")')


def build(kind: str, spec: str | Mapping[str, Any] | Component) -> Any:
    """Build a component from `badnets` or `{name: badnets, rate: 0.05}`."""
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        return spec
    knobs = dict(spec)
    name = knobs.pop("name", None)
    if not isinstance(name, str):
        example = next((key for key in knobs if key in names(kind)), names(kind)[0])
        article = "An" if kind == "attacks" else "A"
        raise UserError(
            f"{article} {kind.removesuffix('s')} needs a name, as in {{name: {example}}}; "
            f"got {shortened(dict(spec))}."
        )
    cls = find(kind, name)
    return cls.make(_with_preset(cls, knobs))


def _with_preset(cls: type[Component], knobs: dict[str, Any]) -> dict[str, Any]:
    """Merge the knobs of the named preset with the explicit knobs, which take precedence."""
    if "preset" not in knobs:
        return knobs
    preset = str(knobs.pop("preset"))
    if preset not in cls.presets:
        if not cls.presets:
            raise UserError(f"{cls.label()} has no presets.")
        raise unknown(f"preset of {cls.label()}", preset, cls.presets)
    return {**cls.presets[preset].knobs, **knobs}
