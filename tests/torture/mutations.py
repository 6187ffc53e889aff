"""Lines of the code are changed; a test must notice."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.helpers.places import ROOT
from tests.torture.row import Figures, Ground, row

TESTED = {
    "backfire/registry.py": "tests/test_registry.py",
    "backfire/claims.py": "tests/test_claims.py",
    "backfire/launch/work.py": "tests/launch/test_work.py",
    "backfire/launch/board.py": "tests/launch/test_work.py",
    "backfire/store.py": "tests/test_store.py",
    "backfire/errors.py": "tests/test_errors.py",
    "backfire/evaluate/stats.py": "tests/evaluate/test_stats.py",
    "backfire/results/compare.py": "tests/results/test_compare.py",
    "backfire/resources.py": "tests/test_resources.py",
}
"""Modules, and the test file of each: quick ones, which train nothing."""
PARTS = ("backfire", "tests", "docs", "pyproject.toml", "README.md")
SECONDS = 300
"""A mutant that runs longer hangs, which is noticed as well."""
OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@row(
    "In a copy of the code, one line of a module that decides what is done, kept or compared is "
    "changed: a comparison or an operator becomes its opposite, a condition is negated, or a "
    "statement is left out. The module's own test file must fail; the surviving changes are "
    "printed, and some of them change nothing that a user could see.",
    full=100,
    small=0,  # it tests the tests
    zero=("files_that_fail_unchanged",),
    some=("mutants", "noticed"),
)
def mutations(count: int, ground: Ground) -> Figures:
    rng, found = Random(0), Counter[str]()
    copy = ground.root / "copy"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, copy / part)
    modules = list(TESTED)[: max(1, count)]
    for module in modules:
        found["files_that_fail_unchanged"] += _fails(copy, TESTED[module])
    for number in range(count):
        module = modules[number % len(modules)]
        text = (copy / module).read_text("utf-8")
        line, changed = _mutant(text, rng)
        (copy / module).write_text(changed, "utf-8")
        noticed = _fails(copy, TESTED[module])
        (copy / module).write_text(text, "utf-8")
        found["mutants"] += 1
        found["noticed" if noticed else "survived"] += 1
        if not noticed:
            print(f"{module}:{line} survived: {text.splitlines()[line - 1].strip()}", flush=True)
    names = ("mutants", "noticed", "survived", "files_that_fail_unchanged")
    return {name: found[name] for name in names}


def _fails(copy: Path, file: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def _mutant(text: str, rng: Random) -> tuple[int, str]:
    """A line number, and the text with one change in that line."""
    tree = ast.parse(text)
    line, change = rng.choice([*_changes(tree)])
    change()
    return line, ast.unparse(ast.fix_missing_locations(tree))


def _changes(tree: ast.AST) -> Iterator[tuple[int, Callable[[], None]]]:
    """Every change of a syntax tree: its line, and a function that makes it."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Compare):
                yield node.lineno, lambda node=node: _replace(node.ops, 0)
            elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPPOSITES:
                yield node.lineno, lambda node=node: setattr(node, "op", OPPOSITES[type(node.op)]())
            elif isinstance(node, ast.If | ast.While | ast.IfExp):
                yield node.lineno, lambda node=node: setattr(node, "test", _not(node.test))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                yield node.lineno, lambda node=node: setattr(node, "value", ast.Constant(None))


def _replace(operators: list[ast.cmpop], at: int) -> None:
    operators[at] = OPPOSITES[type(operators[at])]()  # type: ignore[call-overload]


def _not(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)
