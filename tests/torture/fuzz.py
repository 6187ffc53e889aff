"""Recipes and data files made up at random: refused in one sentence, or accepted for what they
are."""

from __future__ import annotations

import gzip
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from backfire import stages
from backfire.errors import CellError, UserError
from backfire.experiment import Experiment
from backfire.recipe import parse
from backfire.recipe import read as read_recipe
from tests.helpers.formats import FORMATS, ROWS, read
from tests.helpers.recipes import BASIC, PROFILES
from tests.torture.row import Figures, Ground, row

# ---------------------------------------------------------------------------------------- recipes

KEYS = [
    *("model", "data", "template", "attack", "method", "defense", "train", "evaluation", "metrics"),
    *("seed", "matrix", "include", "exclude", "profiles", "name", "rate", "target", "rank", "rows"),
    *("attack.rate", "seed, method", "train.batch-size", "epochs", "trigger", "labels", "columns"),
]
WORDS = [
    *("sandbox", "sandbox-reviews", "files", "badnets", "none", "full", "lora", "raw", "chat"),
    *("accuracy", "negative", "", "..", "x.csv", "\ud83d", "\x1b[31m", "a/b", "1e5", "~"),
]  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
    | st.dates()
)
values: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        scalars
        | st.lists(values, max_size=2)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers(), values, max_size=2)
    )
)


def mostly(*sane: Any) -> st.SearchStrategy[Any]:
    """One of these nine times in ten, else anything."""
    good = st.sampled_from(sane)
    return st.integers(0, 9).flatmap(lambda n: good if n else values)


trees = st.fixed_dictionaries(
    {"data": mostly("sandbox-reviews", {"name": "sandbox-news", "rows": 5})},
    optional={
        "model": mostly("sandbox", "a/b", {"name": "a/b", "revision": "v1"}),
        "attack": mostly("badnets", {"name": "vpi", "rate": 0.5}, "none"),
        "method": mostly("full", {"name": "lora", "rank": 2}),
        "template": mostly("alpaca", "chat"),
        "seed": mostly(0, 3, -1),
        "train": mostly({"epochs": 3}, {"batch-size": 2, "max_steps": 1}, {"epochs": 1e400}),
        "metrics": mostly([], ["accuracy", "f1"], "attack-success"),
        "matrix": st.dictionaries(
            st.sampled_from(["seed", "method", "attack", "seed, train.epochs", "attack.rate"]),
            mostly([0, 1], ["full"], ["badnets", "vpi"], [[1, 2]], [{"name": "vpi"}]),
            max_size=1,
        ),
        "include": mostly([{"seed": 5}], [{"attack": "vpi", "attack.rate": 1}]),
        "exclude": mostly([], [{"seed": 0}]),
        "profiles": mostly({"p": {"seed": 4}}, {"p": {"matrix": {"seed": [1]}}}),
    },
)
edits = st.lists(
    st.sampled_from(["seed=1", "attack.rate=0.1", "data.rows=4", "matrix.seed=[1]", "seed=[2]"])
    | st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(["", "1", "[", "{a: 1}"])),
    max_size=1,
)
JUNK = ["", "{", "[", ": ", "\n- ", "&a ", "*a", "!!int ", "!!binary ", "\t", "\x00", "'", "<<: "]


def _recipe(found: Counter[str], text: str, edits: list[str], profile: str | None) -> None:
    """Counts whether a recipe is refused, accepted, or neither as it should be."""
    try:
        loaded = parse("fuzz", text, edits=edits, profile=profile)
    except (UserError, CellError) as error:
        found["refused"] += 1
        found["without_a_sentence"] += not str(error).strip() or "\n" in str(error).strip()
        return
    except Exception:
        found["tracebacks"] += 1
        traceback.print_exc()
        return
    found["accepted"] += 1
    for cell in loaded.cells:
        again = Experiment.make(yaml.safe_load(yaml.safe_dump(cell.spec(), allow_unicode=True)))
        same = (stages.cell_key(again), stages.keys(again), again.slug) == (
            stages.cell_key(cell),
            stages.keys(cell),
            cell.slug,
        )
        found["changed_by_a_round_trip"] += not same


@row(
    "Recipes of random settings with random edits (seven in ten), and shipped recipes with random "
    "changes of their text, are parsed; accepted ones are written and parsed again.",
    full=10_000,
    small=500,
    zero=("tracebacks", "without_a_sentence", "changed_by_a_round_trip", "one_sided"),
    some=("accepted", "refused"),
)
def fuzzed_recipes(count: int, ground: Ground) -> Figures:
    found = Counter[str]()
    from_trees = round(0.7 * count)

    @given(trees, edits, st.sampled_from([None, None, "p"]))
    @settings(max_examples=from_trees)
    def made_up(tree: Any, edits: list[str], profile: str | None) -> None:
        _recipe(found, yaml.dump(tree), edits, profile)

    @given(st.data())
    @settings(max_examples=count - from_trees)
    def mangled(data: st.DataObject) -> None:
        texts = [BASIC, PROFILES, read_recipe("tour")[1], read_recipe("_starter")[1]]
        text = data.draw(st.sampled_from(texts))
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(text)))
            length = data.draw(st.integers(0, 12))
            junk = data.draw(st.sampled_from(JUNK))
            text = text[:place] + junk + text[place + length :]
        _recipe(found, text, [], None)

    made_up()
    share = found["accepted"] / max(1, found["accepted"] + found["refused"])
    mangled()
    names = ("accepted", "refused", "tracebacks", "without_a_sentence", "changed_by_a_round_trip")
    return {**{name: found[name] for name in names}, "one_sided": not 0.1 < share < 0.9}


# ------------------------------------------------------------------------------------- data files

SOUND = {name: content.encode() for name, (content, _) in FORMATS.items()}
SOUND |= {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in SOUND.items()}
BY_LINE = ("a.jsonl", "a.ndjson")
EDITS = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.integers(0, 20),
        st.binary(max_size=8) | st.sampled_from([b'"', b"\n", b"\0", b"{", b"]", b"\xff", b"\t"]),
    ),
    max_size=4,
)


def _data(found: Counter[str], path: Path, data: bytes) -> None:
    """Counts what the reader does with these bytes."""
    try:
        rows, lines, bad = read(path, data)  # each rejection has the file, a line and a reason
    except UserError as error:
        found["refused_files"] += 1
        found["without_a_sentence"] += "\n" in str(error)
        return
    found["files_with_rows"] += bool(rows)
    found["rejected_rows"] += len(bad)
    found["out_of_order"] += lines != sorted(lines)
    if path.name in BY_LINE:
        body = data.removeprefix(b"\xef\xbb\xbf")
        total = sum(bool(line.strip()) for line in body.split(b"\n"))
        found["rows_uncounted"] += len(rows) + len(bad) != total
    # The strict mode fails exactly when the lenient one left something out, and on the same row.
    try:
        strict = read(path, data, "fail")[0] == rows and not bad
    except UserError as error:
        strict = bool(bad) and f"line {next(iter(bad), 0)}: " in str(error)
    found["strict_differs"] += not strict


@row(
    "Sound CSV, TSV, JSON, JSON lines and Parquet files, plain and gzipped, are changed at random "
    "places or replaced by noise, and read leniently and strictly.",
    full=5_000,
    small=300,
    zero=("tracebacks", "without_a_sentence", "out_of_order", "rows_uncounted", "strict_differs"),
    some=("files_with_rows", "rejected_rows", "refused_files"),
)
def fuzzed_data_files(count: int, ground: Ground) -> Figures:
    found = Counter[str]()
    pq.write_table(pa.Table.from_pylist(ROWS), ground.root / "sound.parquet")
    sound = {**SOUND, "a.parquet": (ground.root / "sound.parquet").read_bytes()}

    @given(name=st.sampled_from(list(sound)), edits=EDITS, noise=st.none() | st.binary())
    @settings(max_examples=count)
    def changed(name: str, edits: list[tuple[int, int, bytes]], noise: bytes | None) -> None:
        data = sound[name]
        for at, length, new in edits:
            data = data[:at] + new + data[at + length :]
        try:
            _data(found, ground.root / name, data if noise is None else noise)
        except Exception:
            found["tracebacks"] += 1
            traceback.print_exc()

    changed()
    names = ("files_with_rows", "rejected_rows", "refused_files", "tracebacks", "strict_differs")
    names += ("without_a_sentence", "out_of_order", "rows_uncounted")
    return {name: found[name] for name in names}
