"""Writes `docs/catalog.md` and the file tree in the README from the registry and the docstrings.

Run it after a change of either: `python docs/make_catalog.py`.
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
from backfire.experiment import Align, Evaluation, Experiment, Machine, Model, Safety, Train
from backfire.registry import KINDS, find, names
from backfire.sandbox.base import Pretrain

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Catalog

Everything a recipe can name. Made from the code by `python docs/make_catalog.py`, so do not edit it
by hand. `backfire show NAME` prints the same for one component. Where each comes from, with
published settings, is in [papers.md](papers.md).
"""
NOUNS = {
    "attacks": base.Poison,
    "methods": base.Method,
    "defenses": base.Defense,
    "metrics": base.Metric,
    "judges": base.Judge,
    "datasets": base.Dataset,
    "templates": base.Template,
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
PLAIN = {
    "_starter.yaml": "What `backfire init` writes",
    "py.typed": "Says that the package has types",
    "page.css": "What the report looks like",
    "page.html.j2": "The report's skeleton; everything from a file is escaped",
}
OPEN, CLOSE = "<!-- file-tree -->", "<!-- /file-tree -->"


def main() -> None:
    """Write what is out of date."""
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Each generated page with the text it should have."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    tree = f"{before}{OPEN}\n```\n{file_tree()}```\n{CLOSE}{after}"
    return {ROOT / "docs" / "catalog.md": catalog(), readme: tree}


# ------------------------------------------------------------------------------------ catalog


def catalog() -> str:
    """All components with their knobs, the recipes, and the settings of a cell."""
    parts = [HEAD]
    for kind in KINDS:
        classes = [find(kind, name) for name in names(kind)]
        shared = NOUNS.get(kind, Component)
        parts.append(f"## {kind.capitalize()}\n")
        parts.append(_table(("name", "what it is"), [_entry(item) for item in classes]))
        if shared.model_fields:
            some = "all" if all(issubclass(item, shared) for item in classes) else "most"
            parts.append(f"Knobs that {some} {kind} have:\n")
            parts.append(_knobs(shared.model_fields))
        parts += [_component(item, shared) for item in classes]
    parts.append("## Recipes\n")
    shipped = [name for name in recipe.shipped() if not name.startswith("_")]
    asked = [(f"`{name}`", _question(recipe.read(name)[1])) for name in shipped]
    parts.append(_table(("name", "question"), asked))
    parts.append("## Settings\n")
    for title, config in SETTINGS.items():
        parts.append(f"### {title}\n\n{_paragraphs(config)}\n")
        parts.append(_knobs(config.model_fields))
    return "\n".join(parts).rstrip() + "\n"


def _question(text: str) -> str:
    return next((line for line in text.splitlines() if line.startswith("#")), "").lstrip("# ")


def _entry(item: type[Component]) -> tuple[str, str]:
    return f"[`{item.name}`](#{item.name})", first_sentence(item.__doc__ or "")


def _component(item: type[Component], shared: type[Component]) -> str:
    """Its text, and the knobs it does not simply inherit."""
    parent = item.__mro__[1]
    if not (issubclass(parent, Component) and hasattr(parent, "name")):
        parent = shared
    own = {
        name: info
        for name, info in item.model_fields.items()
        if name not in parent.model_fields or _default(info) != _default(parent.model_fields[name])
    }
    version = f"\n(Version {item.version}.)\n" if item.version > 1 else ""
    beside = "" if parent is shared else f"\nHas all knobs of [`{parent.name}`](#{parent.name}).\n"
    knobs = f"\n{_knobs(own)}" if own else ""
    return f"### {item.name}\n\n{_paragraphs(item)}\n{version}{beside}{knobs}{_presets(item)}"


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
    return f"\n{_table(('preset', 'source', 'knobs'), rows)}"


def _paragraphs(item: type) -> str:
    texts = (item.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(" ".join(text.split()) for text in texts)


def _knobs(fields: dict[str, FieldInfo]) -> str:
    rows = [
        (f"`{name}`", _default(info), " ".join((info.description or "").split()))
        for name, info in fields.items()
    ]
    return _table(("knob", "default", "meaning"), rows)


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


# ----------------------------------------------------------------------------------- file tree


def file_tree() -> str:
    """The package's files, one a line, each with what it is for; no empty `__init__.py`."""
    lines = _lines(ROOT / "backfire", "  ")
    width = max(len(name) for name, text in lines if text) + 2
    return "backfire/\n" + "".join(f"{n:<{width if t else 0}}{t}\n" for n, t in lines)


def _lines(folder: Path, indent: str) -> list[tuple[str, str]]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__py")))
    files = [path for path in inside if path.is_file()]
    found = [
        (f"{indent}{path.name}", purpose(path))
        for path in files
        if path.stat().st_size or path.name in PLAIN
    ]
    for path in (path for path in inside if path.is_dir()):
        found += [(f"{indent}{path.name}/", ""), *_lines(path, indent + "  ")]
    return found


def purpose(path: Path) -> str:
    """What a file says of itself: its docstring, its component's, or its first comment."""
    if path.name in PLAIN:
        return PLAIN[path.name]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text)
        registered = (
            node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list
        )
        own = next((found for node in registered if (found := ast.get_docstring(node))), "")
        component = path.parent.name in KINDS
        text = (own if component else "") or ast.get_docstring(tree) or own
        return _brief(first_sentence(text))
    return _brief(_question(text))


def _brief(sentence: str) -> str:
    """The sentence without its citations, cut where it pauses if it is long."""
    sentence = re.sub(r"\s*\((?=[^()]*(?:\d{4}|arXiv))[^()]*\)", "", sentence).rstrip(".")
    while len(sentence) > 84 and (pause := re.match(r"(.*\S)\s*[:;,]\s", sentence)):
        sentence = pause.group(1)
    return sentence


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, on one line."""
    flat = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", flat, maxsplit=1)[0]


if __name__ == "__main__":
    main()
