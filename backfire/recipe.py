"""Reads recipes: YAML + profile + edits on the command line -> a list of cells.

Precedence: component defaults < recipe < profile < matrix axis < edits on the command line
(an edit of a key that is an axis replaces the axis; a list gives it other values).
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from backfire import stages
from backfire.data.recipe_files import recipe_folder
from backfire.errors import UserError, kind_of, shortened, unknown
from backfire.experiment import Experiment
from backfire.no_recipe import refuse_other
from backfire.other_names import hint
from backfire.yaml12 import read_yaml

_SETTINGS = tuple(Experiment.model_fields)
_KEYS = (*_SETTINGS, "matrix", "include", "exclude", "profiles")
_MAX_CELLS = 10_000
_DASHES = ("-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2212")
_NAMED = ("model", "data", "template", "attack", "method", "defense")
_OLD_PROFILES = {"real": "small", "qa": "small"}  # what shipped profiles were called before
_SHIPPED = resources.files("backfire") / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: its cells, and each cell's values of the matrix axes."""

    name: str
    text: str
    cells: tuple[Experiment, ...]
    axes: tuple[dict[str, Any], ...]

    @property
    def question(self) -> str:
        """The first comment line of the file."""
        lines = [
            line.lstrip("# ").strip() for line in self.text.splitlines() if line.startswith("#")
        ]
        return next((line for line in lines if line), self.name)


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    files = [file.name for file in _SHIPPED.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def read(name: str) -> tuple[str, str]:
    """Name and text of a recipe given by name or by path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"No such recipe file: {name}.")
        refuse_other(path)
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name} is not UTF-8 text.") from None
    if name not in shipped():
        refuse_other(path)
        raise unknown("recipe", name, [name for name in shipped() if not name.startswith("_")])
    return name, (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def load(name: str, *, profile: str | None = None, edits: Sequence[str] = ()) -> Recipe:
    """Read a recipe and resolve its cells.

    Raises:
        UserError: something in it is invalid, in one sentence.
    """
    title, text = read(name)
    folder = Path(name).parent if Path(name).is_file() else None
    return parse(title, text, profile=profile, edits=edits, folder=folder)


def parse(
    title: str,
    text: str,
    *,
    profile: str | None = None,
    edits: Sequence[str] = (),
    folder: Path | None = None,
) -> Recipe:
    """Resolve the text of a recipe; `@PATH` in it is a file in `folder`."""
    recipe = _mapping(read_yaml(text, title), title)
    for key in recipe:
        if key not in _KEYS:
            raise unknown(f"key in recipe '{title}':", key, _KEYS, hint(key, _KEYS))
    profiles = _mapping(recipe.pop("profiles", None) or {}, "profiles")
    if profile is not None:
        if profile not in profiles:
            now = _OLD_PROFILES.get(profile)
            raise unknown(
                f"profile of recipe '{title}':",
                profile,
                profiles,
                f"it is called '{now}' now." if now in profiles else None,
            )
        recipe = _merge(recipe, _mapping(profiles[profile], f"profile '{profile}'"))
    points = Points(
        _matrix(recipe.pop("matrix", None)),
        _list_of_mappings(recipe.pop("include", None), "include"),
        _list_of_mappings(recipe.pop("exclude", None), "exclude"),
    )
    _check_exclude(points.exclude, points.matrix)
    changes = [parse_edit(edit) for edit in edits]
    for key, value in changes:
        points.edit(key, value)
    if any(key == "exclude" for key, _ in changes):
        _check_exclude(points.exclude, {**points.matrix, **points.pinned})
    if "data" not in {*recipe, *points.pinned, *_keys_of(points.matrix)}:
        raise UserError(f"Recipe '{title}' has no data; add for instance data: sandbox-reviews.")
    with recipe_folder(folder):
        cells, axes = _expand(recipe, points)
    return Recipe(title, text, cells, axes)


@dataclass
class Points:
    """The points of the matrix: its axes, `include`, `exclude`, and values fixed by edits."""

    matrix: dict[str, Any]
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]]
    pinned: dict[str, Any] = field(default_factory=dict)
    """Set by an edit to one value; overrides everything else."""

    def edit(self, key: str, value: Any) -> None:
        """Apply one edit of the command line; later edits override earlier ones."""
        if key == "matrix":
            self.matrix = _matrix(value)
            self.pinned = {k: v for k, v in self.pinned.items() if k not in _keys_of(self.matrix)}
        elif key == "include":
            self.include = _list_of_mappings(value, "include")
        elif key == "exclude":
            self.exclude = _list_of_mappings(value, "exclude")
        elif key == "profiles":
            raise UserError("Profiles cannot be edited; choose one with --profile NAME.")
        elif key.startswith("matrix."):
            self._set_axis(_axis(key.removeprefix("matrix.")), value)
        elif isinstance(value, list) and key in _keys_of(self.matrix):
            self._set_axis(key, value)
        else:
            self.matrix.pop(key, None)
            self.pinned[key] = value

    def _set_axis(self, axis: str, values: Any) -> None:
        if values is None:
            if axis not in self.matrix:
                raise unknown("axis to remove:", axis, self.matrix, hint(axis, self.matrix, None))
            del self.matrix[axis]
            return
        self.matrix = _once_each({**self.matrix, axis: values})
        for key in _split_axis(axis):
            self.pinned.pop(key, None)


def _matrix(value: Any) -> dict[str, Any]:
    """The axes by name; no two axes set the same key."""
    matrix: dict[str, Any] = {}
    for given, values in _mapping({} if value is None else value, "matrix").items():
        axis = _axis(given)
        if axis in matrix:
            raise UserError(f"matrix: duplicate axis '{axis}'.")
        matrix[axis] = values
    return _once_each(matrix)


def _once_each(matrix: dict[str, Any]) -> dict[str, Any]:
    for axis in matrix:
        if len({*_split_axis(axis)}) < len(_split_axis(axis)):
            raise UserError(f"matrix: the axis '{axis}' names a setting twice.")
    for axis, other in itertools.combinations(matrix, 2):
        if both := {*_split_axis(axis)} & {*_split_axis(other)}:
            key, linked = min(both), axis if "," in axis else other
            raise UserError(
                f"matrix: '{key}' is set by two axes, '{axis}' and '{other}'; change or remove one "
                f'of them, as in "matrix.{linked}=null".'
            )
    return matrix


def _keys_of(matrix: Mapping[str, Any]) -> set[str]:
    return {key for axis in matrix for key in _split_axis(axis)}


def _check_exclude(rules: list[dict[str, Any]], matrix: Mapping[str, Any]) -> None:
    axes = _keys_of(matrix)
    for key in itertools.chain.from_iterable(rules):
        if key not in axes:
            raise unknown("axis in exclude:", key, axes, hint(key, axes, None))


def _expand(
    recipe: dict[str, Any], points: Points
) -> tuple[tuple[Experiment, ...], tuple[dict[str, Any], ...]]:
    """Every combination of the axes, minus `exclude`, plus `include`; equal cells once.

    Values `pinned` by an edit override the axes, also inside a component that an axis selects.
    """
    matrix, include, pinned = points.matrix, points.include, points.pinned
    cells: dict[str, tuple[Experiment, dict[str, Any]]] = {}
    choices = []
    for axis, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"matrix: {axis} must be a list of values, as in {axis}: [0, 1].")
        choices.append([_choice(axis, value) for value in values])
    if (size := math.prod(map(len, choices))) > _MAX_CELLS:
        raise UserError(f"The matrix has {size} cells; at most {_MAX_CELLS} are allowed.")
    combinations = (
        {k: v for part in combination for k, v in part.items()}
        for combination in itertools.product(*choices)
    )
    kept = [
        c for c in combinations if not any(_matches({**c, **pinned}, r) for r in points.exclude)
    ]
    varied = _keys_of(matrix)
    for point in [*kept, *include]:
        settings, values = copy.deepcopy(recipe), {**point, **pinned}
        # Components first, so that `attack.rate` sets a knob of the attack that `attack` selects.
        for key in sorted(values, key=lambda k: (k.count("."), k)):
            set_key(settings, key, copy.deepcopy(values[key]))
        experiment = Experiment.make(settings, where="recipe")
        shown = {
            k: _resolved(k, v, values)
            for k, v in point.items()
            if k not in pinned and (k in varied or point in include)
        }
        cells.setdefault(stages.cell_key(experiment), (experiment, shown))
    if not cells:
        raise UserError("The matrix has no cells: `exclude` removes all of them.")
    experiments, axes = zip(*cells.values(), strict=True)
    return experiments, axes


def _resolved(axis: str, value: Any, values: Mapping[str, Any]) -> Any:
    """The value of an axis, with the knobs that other axes and edits override."""
    if not isinstance(value, Mapping):
        return value
    return {knob: values.get(f"{axis}.{knob}", own) for knob, own in value.items()}


def _choice(axis: str, value: Any) -> dict[str, Any]:
    """One value of an axis; `"a, b": [[1, 2], ...]` links several keys."""
    keys = _split_axis(axis)
    if len(keys) == 1:
        return {keys[0]: value}
    if not isinstance(value, list) or len(value) != len(keys):
        raise UserError(
            f"matrix: {axis} links {len(keys)} keys, so each value must be a list of {len(keys)}, "
            f"not {shortened(repr(value))}."
        )
    return dict(zip(keys, value, strict=True))


def _axis(given: str) -> str:
    return ", ".join(_split_axis(given))


def _split_axis(axis: str) -> list[str]:
    return [key.strip().replace("-", "_") for key in axis.split(",")]


def _matches(point: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    def name(value: Any) -> Any:
        return value.get("name") if isinstance(value, dict) else value

    return bool(rule) and all(
        key in point and (point[key] == value or name(point[key]) == value)
        for key, value in rule.items()
    )


def set_key(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c`; a component given by its bare name becomes {name: ...} to hold a knob."""
    head, *rest = key.replace("-", "_").split(".")
    if head not in _SETTINGS:
        raise unknown("setting", head, _SETTINGS, hint(head, _KEYS))
    if not rest:
        settings[head] = value
        return
    place = settings.get(head)
    if isinstance(place, str):
        place = {"name": place}
    elif place is None and head in ("model", "template", "method"):
        place = {"name": {"model": "sandbox", "template": "raw", "method": "full"}[head]}
    elif place is None and head == "attack":
        raise UserError(f"{key} is set, but the recipe has no attack.")
    if place is None:
        place = {}
    if not isinstance(place, dict):
        raise UserError(f"{key} cannot be set: {head} is {shortened(repr(place))}.")
    settings[head] = place
    for part in rest[:-1]:
        nested = place.setdefault(part, {})
        if not isinstance(nested, dict):
            raise UserError(f"{key} cannot be set: {part} is {shortened(repr(nested))}.")
        place = nested
    place[rest[-1]] = value


def parse_edit(edit: str) -> tuple[str, Any]:
    """Key and value of `key=value`, where the value is YAML. An axis that links several keys is
    written as in a recipe: `matrix.method, seed=[[full, 0]]`, with or without quotes."""
    left, equals, text = edit.partition("=")
    key = re.sub(r"""(?<=^matrix\.)(["'])(.*)\1$""", r"\2", left.strip())
    name = r"[A-Za-z_][\w-]*(\.[\w-]+)*"
    linked = rf"(\s*,\s*{name})*" if key.startswith("matrix.") else ""
    if edit[:1] in _DASHES:
        raise UserError(f"An option begins with two plain hyphens, --like-this; got '{edit}'.")
    if odd := next((dash for dash in _DASHES[1:] if dash in left), None):
        raise UserError(f"'{shortened(left)}' has a typographic dash ({odd}); write - or _.")
    if not equals or not re.fullmatch(name + linked, key):
        raise UserError(
            f"An edit looks like key=value, as in attack.rate=0.1; got '{shortened(edit)}'."
        )
    try:
        value = read_yaml(text, f"value of {key}")
    except UserError as error:
        # The shell ends an argument at a space.
        cut = text.lstrip()[:1] in ("[", "{") and not text.rstrip().endswith(("]", "}"))
        hint = f" It is cut off; put quotes around the whole edit: '{key}=[...]'." if cut else ""
        raise UserError(f"{error}{hint}") from None
    if text.count("#") > str(value).count("#"):
        raise UserError(f"value of {key}: # begins a comment; put text with # in quotes.")
    return key.replace("-", "_"), value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings; `over` wins. Different components and the matrix are replaced, not merged."""
    out = dict(base)
    for key, value in over.items():
        if key in ("matrix", "include", "exclude"):
            out[key] = value
            continue
        old = out.get(key)
        if key in _NAMED and isinstance(old, str):
            old = {"name": old}
        same = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        )
        out[key] = _merge(old, value) if same and isinstance(old, dict) else value
    return out


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a mapping of keys to values, not {kind_of(value)}.")
    for key in value:
        if not isinstance(key, str):
            raise UserError(
                f"{what}: the key {shortened(repr(key))} is {kind_of(key)}, not a name."
            )
    return value


def _list_of_mappings(value: Any, what: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{what} must be a list of mappings, not {kind_of(value)}.")
    return [
        {key.replace("-", "_"): v for key, v in _mapping(item, f"each item of {what}").items()}
        for item in value
    ]
