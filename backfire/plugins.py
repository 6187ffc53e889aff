"""Components from outside the package: one Python file, or an installed package.

A plug-in is code, so it is loaded only if the user passes its file or has installed it. A recipe or
a run folder, which may come from anyone, cannot load code. The hash of the plug-in's content is
part of the identity of each of its components.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from backfire.errors import UserError, shortened, unknown

GROUP = "backfire"
"""The entry-point group, as in `[project.entry-points.backfire]`."""
MARKED: list[type] = []
"""Every class outside this package with `@register`."""


@dataclass(frozen=True)
class Plugin:
    """A loaded plug-in."""

    name: str
    """The file name, or the distribution name of the package."""
    version: str
    """Version of the package; empty for a file."""
    sha256: str
    """Hash of the file, or of all files of the package."""
    path: Path | None
    """Path of the file; None for an installed package."""
    code: bytes = field(repr=False)
    """Content of the file when it was read; empty for a package."""
    components: tuple[type[Any], ...]

    @property
    def title(self) -> str:
        return f"plug-in '{self.name}'"

    def __reduce__(self) -> Any:
        """Another process loads the plug-in again; a file from the code that this process has
        read."""
        return (_from_code, (self.path, self.code)) if self.path else (from_package, (self.name,))

    def facts(self, used: Iterable[str] | None = None) -> dict[str, Any]:
        """The record of the plug-in in a result, with the components named in `used`, or all."""
        shown = [c for c in self.components if used is None or c.name in used]
        return {
            "name": self.name,
            "version": self.version or None,
            "sha256": self.sha256,
            "components": [cls.label() for cls in shown],
        }


def from_file(path: Path) -> Plugin:
    """Load the plug-in in a Python file.

    Raises:
        UserError: the file does not exist or cannot be loaded.
    """
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"'{shortened(path)}' is a folder; a plug-in is a Python file.")
    if path.suffix != ".py":
        raise UserError(
            f"A plug-in is a Python file ending in .py (got {shortened(path)}); an installed "
            "package needs no --plugin."
        )
    if not path.is_file():
        raise UserError(f"No such plug-in file: {shortened(path)}.")
    return _from_code(path.resolve(), path.read_bytes())


def _from_code(path: Path, code: bytes) -> Plugin:
    digest = hashlib.sha256(code).hexdigest()
    stem = re.sub(r"\W", "_", path.stem)
    # The module name contains the hash, so an edited file is a new module.
    name = f"{GROUP}_plugin_{stem}_{digest[:12]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module  # pydantic reads annotations and docstrings from there
        try:
            exec(compile(code, str(path), "exec", dont_inherit=True), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise _failed(path.name, error, [str(path)]) from None
    return Plugin(path.name, "", digest, path, code, _marked(path.name, [name]))


@cache
def packages() -> dict[str, list[EntryPoint]]:
    """The installed packages with plug-ins, and their entry points; nothing is imported."""
    by_package: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        by_package.setdefault(entry.dist.name if entry.dist else entry.name, []).append(entry)
    return dict(sorted(by_package.items()))


@cache
def from_package(name: str) -> Plugin:
    """Load the plug-in of an installed package, by the name of the package or of an entry point.

    Raises:
        UserError: no installed package of this name has a plug-in, or it cannot be loaded.
    """
    installed = packages()
    by_name = {entry.name: package for package in installed for entry in installed[package]}
    by_name |= {re.sub(r"[-_.]+", "-", package).lower(): package for package in installed}
    package = by_name.get(name) or by_name.get(re.sub(r"[-_.]+", "-", name).lower())
    if package is None:
        raise unknown("installed plug-in", name, installed)
    entries, files = installed[package], dict[str, Path]()
    try:
        roots = list(dict.fromkeys(_root(entry.module) for entry in entries))
        for root in roots:
            files |= _files(root)
        for entry in entries:
            entry.load()
    except (Exception, SystemExit) as error:
        raise _failed(package, error, [str(file) for file in files.values()]) from None
    digests = [(name, hashlib.sha256(files[name].read_bytes()).hexdigest()) for name in files]
    whole = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
    version = entries[0].dist.version if entries[0].dist else ""
    return Plugin(package, version, whole, None, b"", _marked(package, roots))


def load(plugin: str) -> Plugin:
    """Load a plug-in by its file or by the name of an installed package."""
    path = Path(plugin)
    is_path = path.suffix == ".py" or "/" in plugin or path.exists()
    return from_file(path) if is_path else from_package(plugin)


def _root(module: str) -> str:
    """The outermost package of a module that is not a namespace package; all of it is hashed."""
    name, *rest = module.split(".")
    # Several projects may share a namespace package.
    while rest and _spec(name).origin is None:
        name = f"{name}.{rest.pop(0)}"
    return name


def _spec(module: str) -> ModuleSpec:
    spec = find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{module}'")
    return spec


def _files(module: str) -> dict[str, Path]:
    """All files of a package, or the file of a module, by relative path."""
    spec = _spec(module)
    if spec.submodule_search_locations is None:
        return {module: Path(str(spec.origin))}
    return {
        f"{module}/{file.relative_to(folder).as_posix()}": file
        for folder in map(Path, spec.submodule_search_locations)
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def _marked(plugin: str, roots: Sequence[str]) -> tuple[type[Any], ...]:
    """The current classes of these packages with `@register`."""
    inside = tuple(f"{root}." for root in roots)
    components = [
        cls
        for cls in MARKED
        if f"{cls.__module__}.".startswith(inside)
        and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    ]
    if not components:
        raise UserError(
            f"Plug-in '{shortened(plugin)}' has no component; mark a class with @register(name)."
        )
    return tuple(components)


def _failed(plugin: str, error: BaseException, files: Sequence[str]) -> UserError:
    """The error for a plug-in that cannot be loaded, with the last of its lines in the
    traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(f.filename, f.lineno) for f in frames if f.filename in files]
    reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        reason = f"SyntaxError: {error.msg}"
        places = [(error.filename or plugin, error.lineno or 1)]
    where = f" ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else ""
    return UserError(f"Plug-in '{shortened(plugin)}' cannot be loaded: {shortened(reason)}{where}.")
