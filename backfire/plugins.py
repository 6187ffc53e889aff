"""Components from outside the package: one Python file, or an installed package.

A plug-in is code, so it is loaded only if the user names its file or has installed it; a recipe or
a run folder, which may come from anybody, names no code. Its content is hashed: the hash is part of
the identity of each of its components.
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
"""The group of entry points, as in `[project.entry-points.backfire]`."""
MARKED: list[type] = []
"""Every class outside this package that is marked with `@register`."""


@dataclass(frozen=True)
class Plugin:
    """A plug-in that was loaded."""

    name: str
    """The file's name, or the name of the package as pip knows it."""
    version: str
    """The package's; empty for a file."""
    sha256: str
    """Of the file, or of all files of the package."""
    path: Path | None
    """Of the file; None for an installed package."""
    code: bytes = field(repr=False)
    """Of the file, as it was when it was read; empty for a package."""
    components: tuple[type[Any], ...]

    @property
    def title(self) -> str:
        return f"plug-in '{self.name}'"

    def __reduce__(self) -> Any:
        """In another process it is loaded anew; of a file, the code that this process has read."""
        return (_from_code, (self.path, self.code)) if self.path else (from_package, (self.name,))

    def facts(self, used: Iterable[str] | None = None) -> dict[str, Any]:
        """What a result says of it; of its components those named in `used`, or all."""
        shown = [c for c in self.components if used is None or c.name in used]
        return {
            "name": self.name,
            "version": self.version or None,
            "sha256": self.sha256,
            "components": [cls.label() for cls in shown],
        }


def from_file(path: Path) -> Plugin:
    """The plug-in in one Python file.

    Raises:
        UserError: there is no such file, or it cannot be loaded.
    """
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"'{shortened(path)}' is a folder; a plug-in is a Python file.")
    if path.suffix != ".py":
        raise UserError(
            f"A plug-in is a Python file that ends in .py (got {shortened(path)}); an installed "
            "package needs no --plugin."
        )
    if not path.is_file():
        raise UserError(f"No such plug-in file: {shortened(path)}.")
    return _from_code(path.resolve(), path.read_bytes())


def _from_code(path: Path, code: bytes) -> Plugin:
    digest = hashlib.sha256(code).hexdigest()
    stem = re.sub(r"\W", "_", path.stem)
    # The hash is in the module's name, so that an edited file is another module.
    name = f"{GROUP}_plugin_{stem}_{digest[:12]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module  # pydantic looks up annotations and docstrings there
        try:
            exec(compile(code, str(path), "exec", dont_inherit=True), vars(module))
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise _failed(path.name, error, [str(path)]) from None
    return Plugin(path.name, "", digest, path, code, _marked(path.name, [name]))


@cache
def packages() -> dict[str, list[EntryPoint]]:
    """The installed packages that name plug-ins, with their entry points; none is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.dist.name if entry.dist else entry.name, []).append(entry)
    return dict(sorted(found.items()))


@cache
def from_package(name: str) -> Plugin:
    """The plug-in of an installed package, by the package's name or that of an entry point.

    Raises:
        UserError: no such package has a plug-in, or it cannot be loaded.
    """
    known = packages()
    alike = {re.sub(r"[-_.]+", "-", package).lower(): package for package in known}
    alike = {entry.name: package for package in known for entry in known[package]} | alike
    package = alike.get(name) or alike.get(re.sub(r"[-_.]+", "-", name).lower())
    if package is None:
        raise unknown("installed plug-in", name, known)
    entries, files = known[package], dict[str, Path]()
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
    """A plug-in by its file or by the name of an installed package."""
    path = Path(plugin)
    is_path = path.suffix == ".py" or "/" in plugin or path.exists()
    return from_file(path) if is_path else from_package(plugin)


def _root(module: str) -> str:
    """The outermost package of a module that has code of its own: all of it is hashed."""
    name, *rest = module.split(".")
    while rest and _spec(name).origin is None:  # a namespace, which several projects may share
        name = f"{name}.{rest.pop(0)}"
    return name


def _spec(module: str) -> ModuleSpec:
    spec = find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{module}'")
    return spec


def _files(module: str) -> dict[str, Path]:
    """Every file of a package, or the one of a module, by its place."""
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
    """The classes of these packages that are marked with `@register`, as they are now."""
    inside = tuple(f"{root}." for root in roots)
    found = [
        cls
        for cls in MARKED
        if f"{cls.__module__}.".startswith(inside)
        and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    ]
    if not found:
        raise UserError(
            f"Plug-in '{shortened(plugin)}' has no component; mark a class with @register(name)."
        )
    return tuple(found)


def _failed(plugin: str, error: BaseException, files: Sequence[str]) -> UserError:
    """Why a plug-in cannot be loaded, with the last line of its own that had a part in it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    place: tuple[str | None, int | None] | None = None
    if frames:
        place = (frames[-1].filename, frames[-1].lineno)
    reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        reason, place = f"invalid syntax ({error.msg})", (error.filename, error.lineno)
    where = f" ({Path(place[0] or plugin).name}, line {place[1]})" if place else ""
    return UserError(f"Plug-in '{shortened(plugin)}' cannot be loaded: {shortened(reason)}{where}.")
