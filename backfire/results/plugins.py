"""The plug-ins that a run used, as recorded in its results.

A run folder may come from anyone, so a file that it names is never loaded: the user passes it with
`--plugin`, or has installed the package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from backfire import text
from backfire.registry import find, loaded, names, use_installed
from backfire.result import CellResult


def lacking(items: Iterable[CellResult]) -> list[str]:
    """A sentence for each plug-in of these cells that is not loaded with the same content.

    Loads the installed plug-ins.
    """
    return missing(one for item in items for one in item.plugins)


def missing(plugins: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each of these recorded plug-ins that is not loaded with the same content.

    Loads the installed plug-ins.
    """
    used = {one["sha256"]: one for one in plugins}
    if not set(used) <= {plugin.sha256 for plugin in loaded()}:
        use_installed()
    names = {plugin.sha256: plugin.name for plugin in loaded()}
    return [_sentence(one, names.values()) for sha256, one in used.items() if sha256 not in names]


def _sentence(one: Mapping[str, Any], loaded_names: Collection[str]) -> str:
    name = text.cut(text.line(one.get("name")), 60)
    is_changed = one.get("name") in loaded_names
    why = "whose code has since changed" if is_changed else "which is not loaded"
    return (
        f"This was run with plug-in '{name}' ({described(one)}), {why}; pass its file with "
        "--plugin, or install the package."
    )


def described(one: Mapping[str, Any]) -> str:
    """The version and hash of a plug-in, as in `version 0.1.0, sha256 2c42ab498858`."""
    version = f"version {text.line(one['version'])}, " if one.get("version") else ""
    return text.cut(f"{version}sha256 {text.line(one['sha256'])[:12]}", 80)


def is_same(component: Any, item: CellResult) -> bool:
    """Whether a component is built in, or from a plug-in with the content that the cell used."""
    plugin = component.plugin
    return plugin is None or plugin.sha256 in {one["sha256"] for one in item.plugins}


def is_lost(kind: str, name: str, item: CellResult) -> bool:
    """Whether a component of a cell is from a plug-in that is not loaded or has changed."""
    if not lacking([item]):
        return False
    return name not in names(kind) or not is_same(find(kind, name), item)
