"""Descriptions of settings: the docstrings below them.

Pydantic can read them whenever a class is made, but that takes a fifth of the time in which a
command starts, and few commands show them.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any, TypeVar, get_args

from backfire.base.config import Config

C = TypeVar("C", bound=Config)


def documented(cls: type[C]) -> type[C]:
    """The same class, with the docstring below each knob as its description, and so in its JSON
    schema."""
    if all(info.description for info in cls.model_fields.values()):
        return cls
    texts: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        texts |= _below(part) if issubclass(part, Config) else {}
    for name, info in cls.model_fields.items():
        for leaf in leaves(info.annotation):
            if isinstance(leaf, type) and issubclass(leaf, Config):
                documented(leaf)
        info.description = info.description or texts.get(name)
    cls.model_rebuild(force=True)
    return cls


def leaves(annotation: Any) -> list[Any]:
    """The innermost types of an annotation."""
    inner = [leaf for part in get_args(annotation) for leaf in leaves(part)]
    return inner or [annotation]


def _below(cls: type) -> dict[str, str]:
    """The docstrings below the attributes that a class defines itself; none without its source."""
    try:
        [made] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    found = {}
    for pair in itertools.pairwise(made.body if isinstance(made, ast.ClassDef) else ()):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                found[name] = inspect.cleandoc(text)
    return found
