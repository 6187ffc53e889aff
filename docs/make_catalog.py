"""Writes docs/catalog.md, docs/layout.md and the folder tree of the README from the code.

Run `python docs/make_catalog.py` after changing a component, a setting or a module docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from backfire import base, recipe
from backfire.base import Component, Config
from backfire.base.docstrings import documented
from backfire.experiment import Align, Evaluation, Experiment, Machine, Model, Safety, Train
from backfire.registry import KINDS, find, names
from backfire.sandbox.base import Pretrain

ROOT = Path(__file__).resolve().parents[1]
CATALOG = """# Catalog

Everything a recipe can name. Generated from the code by `python docs/make_catalog.py`; do not edit
it by hand. `backfire show NAME` prints the entry of one component. Sources and published settings
are in [papers.md](papers.md).
"""
LAYOUT = """# Layout

Every file of the package, with its purpose. Generated from the docstrings by
`python docs/make_catalog.py`; do not edit it by hand. How the parts work together is in
[concepts.md](concepts.md).
"""
NOUNS = {
    "attacks": base.Poison,
    "methods": base.Method,
    "defenses": base.Defense,
    "metrics": base.Metric,
    "judges": base.Judge,
    "datasets": base.Dataset,
    "templates": base.Template,
    "scanners": base.Scanner,
}
SETTINGS: dict[str, type[Config]] = {
    "experiment": Experiment,
    "model": Model,
    "train": Train,
    "align": Align,
    "safety": Safety,
    "evaluation": Evaluation,
    "machine": Machine,
    "pretrain": Pretrain,
}
PURPOSES = {
    "_starter.yaml": "The recipe that `backfire init` writes",
    "py.typed": "Marks the package as typed",
    "page.css": "Style sheet of the report",
    "page.html.j2": "Template of the report; everything that comes from a file is escaped",
    "audit.html.j2": "Template of the page of an audit",
    "scan.html.j2": "Template of the page of a scan",
    "backfire/sandbox/model": "The embedded base, as transformers saves it",
    "backfire/recipes": "Recipes: one YAML file per question",
    "docs": "Concepts, guides, catalog, layout, papers, log, decisions, how to add a component",
    "tests": "Tests; the contract tests run over every component",
    "examples": "Three notebooks, as scripts",
    "benchmarks": "The same cells run by backfire and by a plain script, timed side by side",
}
START, END = "<!-- folders -->", "<!-- /folders -->"


def main() -> None:
    """Write the pages that are out of date."""
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Each generated page with the text it should have."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return {
        ROOT / "docs" / "catalog.md": catalog(),
        ROOT / "docs" / "layout.md": layout(),
        readme: f"{before}{START}\n```\n{folder_tree()}```\n{END}{after}",
    }


# ------------------------------------------------------------------------------------ catalog


def catalog() -> str:
    """All components with their settings, the recipes, and the settings of a cell."""
    parts = [CATALOG]
    for kind in KINDS:
        classes = [find(kind, name) for name in names(kind)]
        shared = NOUNS.get(kind, Component)
        parts.append(f"## {kind.capitalize()}\n")
        parts.append(_table(("name", "what it is"), [_entry(item) for item in classes]))
        if shared.model_fields:
            some = "all" if all(issubclass(item, shared) for item in classes) else "most"
            parts.append(f"Settings that {some} {kind} share:\n")
            parts.append(_knobs(documented(shared).model_fields))
        parts += [_component(item, shared) for item in classes]
    parts.append("## Recipes\n")
    shipped = [name for name in recipe.shipped() if not name.startswith("_")]
    questions = [(f"`{name}`", _question(recipe.read(name)[1])) for name in shipped]
    parts.append(_table(("name", "question"), questions))
    parts.append("## Settings\n")
    for title, config in SETTINGS.items():
        parts.append(f"### {title}\n\n{_paragraphs(config)}\n")
        parts.append(_knobs(documented(config).model_fields))
    return "\n".join(parts).rstrip() + "\n"


def _question(text: str) -> str:
    return next((line for line in text.splitlines() if line.startswith("#")), "").lstrip("# ")


def _entry(item: type[Component]) -> tuple[str, str]:
    return f"[`{item.name}`](#{item.name})", first_sentence(item.__doc__ or "")


def _component(item: type[Component], shared: type[Component]) -> str:
    """The docstring of a component and the settings that it does not inherit unchanged."""
    parent = item.__mro__[1]
    if not (issubclass(parent, Component) and hasattr(parent, "name")):
        parent = shared
    own = {
        name: info
        for name, info in documented(item).model_fields.items()
        if name not in parent.model_fields or _default(info) != _default(parent.model_fields[name])
    }
    version = f"\n(Version {item.version}.)\n" if item.version > 1 else ""
    inherited = ""
    if parent is not shared:
        inherited = f"\nHas all settings of [`{parent.name}`](#{parent.name}).\n"
    knobs = f"\n{_knobs(own)}" if own else ""
    return f"### {item.name}\n\n{_paragraphs(item)}\n{version}{inherited}{knobs}{_presets(item)}"


def _presets(item: type[Component]) -> str:
    if not item.presets:
        return ""
    rows = [
        (
            f"`{name}`",
            preset.source,
            ", ".join(f"{knob} {value}" for knob, value in preset.knobs.items()),
        )
        for name, preset in item.presets.items()
    ]
    return f"\n{_table(('preset', 'source', 'settings'), rows)}"


def _paragraphs(item: type) -> str:
    texts = (item.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(" ".join(text.split()) for text in texts)


def _knobs(fields: dict[str, FieldInfo]) -> str:
    rows = [
        (f"`{name}`", _default(info), " ".join((info.description or "").split()))
        for name, info in fields.items()
    ]
    return _table(("setting", "default", "meaning"), rows)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return "not set"
    return "see below" if isinstance(value, Config) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(k)}: {_plain(v)}" for k, v in value.items()) + "}"
    return str(value) if value != "" else '""'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in r] for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -------------------------------------------------------------------------------------- layout


def layout() -> str:
    """Every file of the package, one table per folder; empty files are left out."""
    parts = [LAYOUT]
    for folder in (ROOT / "backfire", *_folders()):
        name = folder.relative_to(ROOT).as_posix()
        rows = [
            (f"[`{path.name}`](../{name}/{path.name})", purpose(path))
            for path in sorted(folder.iterdir())
            if path.suffix != ".pyc" and _has_purpose(path)
        ]
        parts.append(f"## {name}\n\n{_table(('file', 'purpose'), rows)}")
    return "\n".join(parts)


def folder_tree() -> str:
    """The folders of the package and of the repository, one a line."""
    lines = [("backfire/", "The package")]
    lines += [(f"  {folder.name}/", purpose(folder)) for folder in _folders()]
    lines += [(f"{name}/", PURPOSES[name]) for name in ("examples", "benchmarks", "tests", "docs")]
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:<{width}}{text}\n" for name, text in lines)


def _folders() -> list[Path]:
    package = ROOT / "backfire"
    return sorted(path for path in package.iterdir() if path.is_dir() and path.name[0] not in "._")


def _has_purpose(path: Path) -> bool:
    if path.is_dir():
        return path.relative_to(ROOT).as_posix() in PURPOSES
    return path.stat().st_size > 0 or path.name in PURPOSES


def purpose(path: Path) -> str:
    """The first sentence of a file's docstring, its component's docstring or its first comment."""
    name = path.relative_to(ROOT).as_posix()
    if text := PURPOSES.get(name) or PURPOSES.get(path.name):
        return text
    if path.is_dir():
        return purpose(path / "__init__.py")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return _question(text)
    tree = ast.parse(text)
    registered = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list
    ]
    component = next((doc for node in registered if (doc := ast.get_docstring(node))), "")
    docstrings = [component, ast.get_docstring(tree) or ""]
    if path.parent.name not in KINDS:
        docstrings.reverse()
    return _without_citations(first_sentence(next(filter(None, docstrings), "")))


def _without_citations(sentence: str) -> str:
    return re.sub(r"\s*\((?=[^()]*(?:\d{4}|arXiv))[^()]*\)", "", sentence).rstrip(".")


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, on one line."""
    flat = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", flat, maxsplit=1)[0]


if __name__ == "__main__":
    main()
