"""Finds a component by importing the file of the same name.

`attacks/badnets.py` holds `@register("badnets") class BadNets(Attack)`. There is no list to edit:
the names of a kind are the file names in its folder, and nothing is imported before it is needed.
Components of plug-ins come after them; installed plug-ins are loaded when a name is unknown.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from backfire import plugins
from backfire.errors import UserError, shortened, unknown
from backfire.other_names import COMPONENTS
from backfire.plugins import Plugin

KINDS = ("attacks", "methods", "defenses", "metrics", "judges", "datasets", "templates", "scanners")

_loaded: list[Plugin] = []

C = TypeVar("C", bound=type[Any])


def register(name: str, *, version: int = 1) -> Callable[[C], C]:
    """Name a component class. Raise `version` whenever its behavior or a default changes."""

    def mark(cls: C) -> C:
        file = cls.__module__.rpartition(".")[2].replace("_", "-")
        if cls.__module__.startswith("backfire.") and file != name:
            raise TypeError(f"component '{name}' must live in a file of its own name, not '{file}'")
        cls.name, cls.version = name, version
        if not cls.__module__.startswith("backfire."):
            plugins.MARKED.append(cls)
        return cls

    return mark


def names(kind: str) -> list[str]:
    """All names of a kind, sorted; only the package is imported."""
    return sorted([*_built_in(kind), *(cls.name for cls in _outside(kind))])


def _built_in(kind: str) -> list[str]:
    package = importlib.import_module(f"backfire.{kind}")
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    return [name.replace("_", "-") for name in modules if not name.startswith("_")]


def loaded() -> list[Plugin]:
    """The plug-ins in use, in the order they were loaded."""
    return [*_loaded]


def _outside(kind: str) -> list[type[Any]]:
    return [cls for plugin in _loaded for cls in plugin.components if cls.kind == kind]


def find(kind: str, name: str) -> type[Any]:
    """The class of this name; the error for an unknown name suggests the nearest one."""
    wanted, file = name.replace("_", "-"), name.replace("-", "_")
    module = sys.modules.get(f"backfire.{kind}.{file}")  # the folder is listed only if it must be
    if module is None or file.startswith("_"):
        if wanted not in names(kind):
            problems = use_installed()
            if wanted not in names(kind):
                other = COMPONENTS.get(kind, {}).get(wanted.lower())
                hint = f"it is called '{other}' here." if other else None
                error = unknown(kind.removesuffix("s"), name, names(kind), hint)
                raise UserError(" ".join([str(error), *problems]))
        if outside := next((cls for cls in _outside(kind) if cls.name == wanted), None):
            return outside
        module = importlib.import_module(f"backfire.{kind}.{file}")
    for item in vars(module).values():
        own = isinstance(item, type) and item.__module__ == module.__name__
        if own and getattr(item, "name", None) == wanted:
            return cast("type[Any]", item)
    raise TypeError(f'{module.__name__} has no class marked @register("{wanted}")')


def use_installed() -> list[str]:
    """Register the components of all installed plug-ins. Returns a sentence for each plug-in that
    fails: a broken package must not stop a recipe that does not use it."""
    problems = []
    for package in plugins.packages():
        try:
            use(plugins.from_package(package))
        except UserError as error:
            problems.append(str(error))
    return problems


def use(plugin: Plugin) -> None:
    """Register the components of a plug-in.

    Raises:
        UserError: a class is not a component, or its name is already in use.
    """
    if plugin in _loaded:
        return
    for cls in plugin.components:
        if problem := _refusal(cls, plugin.components):
            raise UserError(f"Plug-in '{plugin.name}': {problem}")
    for cls in plugin.components:
        cls.plugin = plugin
    _loaded.append(plugin)


def _refusal(cls: Any, others: Sequence[Any]) -> str | None:
    """Why a class of a plug-in cannot be a component; None if it can."""
    kind, name = getattr(cls, "kind", None), cls.name
    if kind not in KINDS:
        return (
            f"'{cls.__name__}' does not derive from a base class of backfire.base, such as Attack."
        )
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name == "none":
        return f"'{shortened(name)}' is not a valid name; use lowercase letters, digits and dashes."
    if name in _built_in(kind):
        return f"{cls.label()} already exists in backfire; register yours under another name."
    if sum((other.kind, other.name) == (kind, name) for other in others) > 1:
        return f"{cls.label()} is registered twice."
    for plugin in _loaded:
        if any((other.kind, other.name) == (kind, name) for other in plugin.components):
            return f"{cls.label()} already exists in {plugin.title}; use one of the two."
    return None


def build(kind: str, spec: Any) -> Any:
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


def _with_preset(cls: type[Any], knobs: dict[str, Any]) -> dict[str, Any]:
    """Merge the knobs of the named preset with the explicit knobs, which take precedence."""
    if "preset" not in knobs:
        return knobs
    preset = str(knobs.pop("preset"))
    if preset not in cls.presets:
        if not cls.presets:
            raise UserError(f"{cls.label()} has no presets.")
        raise unknown(f"preset of {cls.label()}", preset, cls.presets)
    return {**cls.presets[preset].knobs, **knobs}
