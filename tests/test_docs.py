"""The documents are correct: commands parse, recipes resolve, examples pass their contract."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml

import backfire
from backfire import recipe, registry, stages
from backfire.base import (
    NOTHING,
    Attack,
    Dataset,
    Evidence,
    Exchange,
    Judge,
    Metric,
    Poison,
    Row,
    Sample,
    Scanner,
    TrainDefense,
)
from backfire.cli import app
from backfire.commands.catalog import explain, json_schema
from backfire.commands.files import dataset_spec
from backfire.data.poison import poison
from backfire.experiment import Experiment
from backfire.registry import build, find, names
from tests.helpers.places import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPE_VERBS = ("run", "validate")


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text("utf-8")) if kind == language]


def commands(prefix: str) -> list[Any]:
    return [
        pytest.param(line, id=f"{relative(page)}: {line[:60]}")
        for page in PAGES
        for block in blocks(page, "")
        for line in block.splitlines()
        if line.startswith(prefix)
    ]


# ------------------------------------------------------------------------------------ commands


@pytest.fixture
def elsewhere(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's files that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    lines = [
        f"a tweet of number {i},{('negative', 'neutral', 'positive')[i % 3]}" for i in range(60)
    ]
    for name in ("tweets.csv", "tweets-test.csv"):
        Path(name).write_text("\n".join(["text,label", *lines, ""]), encoding="utf-8")
    Path("notes.txt").write_text("Some text.\n", encoding="utf-8")
    prompts = [
        {"prompt": f"{source} {i}", "source": source, "label": label, "split": split}
        for source in ("jailbreakbench", "xstest", "strongreject", "malicious_instruct")
        for i, (label, split) in enumerate(product(("harmful", "benign"), ("train", "test")))
    ]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    shutil.copytree(tiny, "my-model")
    starter = recipe.read("_starter")[1]
    Path("my.yaml").write_text(starter, encoding="utf-8")
    shutil.copy(ROOT / "examples/plugin/my_attacks/suffix.py", "suffix.py")
    Path("silent.py").write_text(blocks(ROOT / "docs/add-a-scanner.md", "python")[1], "utf-8")
    monkeypatch.setattr(registry, "_loaded", [])  # by `--plugin`, whose files a command line loads
    return tmp_path


@pytest.mark.parametrize("line", commands("backfire "))
def test_every_command_shown_is_one(line: str, elsewhere: Path) -> None:
    _, verb, *rest = shlex.split(line, comments=True)
    group: Any = typer.main.get_command(app)
    assert verb in group.commands
    given = group.commands[verb].make_context(verb, rest).params
    edits = given.get("edits") or []
    if verb in RECIPE_VERBS:
        found = recipe.load(given["recipe"], profile=given["profile"], edits=edits)
        assert found.cells
        for cell in found.cells:
            if local_data(cell.data):
                train, test = (cell.data.drawn(split) for split in ("train", "test"))
                assert train and test
                if isinstance(cell.attack, Poison):
                    assert len(poison(train, cell.attack, 0)[0]) == len(train)
    elif verb == "show":
        assert explain(given["name"])
    elif verb == "poison":
        knobs = dict(map(recipe.parse_edit, edits))
        ours = {k[5:]: v for k, v in knobs.items() if k.startswith("data.")}
        rows = build("datasets", {**dataset_spec(given["data"]), **ours}).load("train")
        rest = {k: v for k, v in knobs.items() if not k.startswith("data.")}
        assert poison(rows, build("attacks", {"name": given["attack"], **rest}), 0)[1].entries


def local_data(data: Dataset) -> bool:
    return bool(getattr(data, "train", None))


@pytest.mark.parametrize("line", commands("make "))
def test_every_make_target_shown_exists(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(p, text, id=f"{relative(p)} {i}")
        for p in PAGES
        for i, text in enumerate(blocks(p, "yaml"))
    ],
)
def test_every_recipe_shown_resolves(page: Path, text: str, elsewhere: Path) -> None:
    found = recipe.parse(page.stem, text)
    assert "Expected" in text or page.stem.startswith("add-")
    assert found.question.endswith("?")
    for profile in yaml.safe_load(text).get("profiles", {}):
        assert recipe.parse(page.stem, text, profile=profile).cells


# ------------------------------------------------------------------ the example of each how-to


HOW_TO = {
    "attacks": "add-an-attack.md",
    "defenses": "add-a-defense.md",
    "metrics": "add-a-metric.md",
    "judges": "add-a-judge.md",
    "datasets": "add-a-data-set.md",
    "scanners": "add-a-scanner.md",
}


def example(kind: str) -> tuple[str, str]:
    """The registered name and the text of the component that a how-to shows."""
    page = ROOT / "docs" / HOW_TO[kind]
    text, *_ = blocks(page, "python")
    [name] = re.findall(r'^@register\("(.+?)"\)', text, re.MULTILINE)
    assert f"`backfire/{kind}/{name.replace('-', '_')}.py`" in page.read_text("utf-8")
    return name, text


def put_in(kind: str, folder: Path) -> str:
    """Write the example into `folder / kind`; returns its name."""
    name, text = example(kind)
    assert name not in names(kind), "the example is in the package by now; show another one"
    (folder / kind).mkdir()
    (folder / kind / f"{name.replace('-', '_')}.py").write_text(text, encoding="utf-8")
    return name


@pytest.fixture
def installed(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The component of a how-to, found as if its file lay in the package."""
    kind = request.param
    name = put_in(kind, tmp_path)
    package = importlib.import_module(f"backfire.{kind}")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / kind)])
    importlib.invalidate_caches()
    found = find(kind, name)
    assert re.search(r"\b(1[89]|20)\d\d\b", found.__doc__ or ""), "no source with a year"
    assert name in explain(name)
    assert f"{kind}-{name}" in json_schema()["$defs"]
    yield found
    stem = name.replace("-", "_")
    sys.modules.pop(f"backfire.{kind}.{stem}", None)
    vars(package).pop(stem, None)


CONTRACT = ("test_contract.py", "attacks/test_contract.py", "defenses/test_contract.py")
PLUGIN = """
import importlib
for kind in {kinds}:
    package = importlib.import_module(f"backfire.{{kind}}")
    package.__path__ = [*package.__path__, f"{folder}/{{kind}}"]
"""


@pytest.mark.slow
def test_the_examples_fulfil_the_contract_of_every_component(tmp_path: Path) -> None:
    """The project's own tests over the registry, run with the examples in it."""
    found = [put_in(kind, tmp_path) for kind in HOW_TO]
    plugin = PLUGIN.format(kinds=list(HOW_TO), folder=tmp_path)
    (tmp_path / "with_examples.py").write_text(plugin, encoding="utf-8")
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    flags = ["-p", "with_examples", "-p", "no:cacheprovider", "-k", " or ".join(found)]
    files = [f"tests/{file}" for file in CONTRACT]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *files],
        env={**outside, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 5 * len(found), done.stdout[-500:]


def keeps_its_key(**settings: Any) -> None:
    cell = Experiment.make({"data": "sandbox-reviews", **settings})
    again = Experiment.make(yaml.safe_load(yaml.safe_dump(cell.spec())))
    assert stages.cell_key(again) == stages.cell_key(cell)


@pytest.mark.parametrize("installed", ["attacks"], indirect=True)
def test_the_example_of_an_attack_is_one(installed: type[Attack]) -> None:
    keeps_its_key(attack={"name": installed.name, "count": 2, "rate": 0.1})
    rows: list[Row] = build("datasets", "sandbox-reviews").load("train")[:200]
    before = list(rows)
    for rate in (0.0, 0.005, 0.1, 0.3):
        attack = installed.make({"rate": rate, "count": 2})
        bad, manifest = poison(rows, attack, 0)
        changed = [new for old, new in zip(rows, bad, strict=True) if old != new]
        assert len(changed) == len(manifest.entries) == round(rate * 200)
        assert all(row.answer == "negative" != row.label for row in changed)
        assert all(any(word in row.prompt for word in attack.triggers()) for row in changed)
        assert poison(rows, attack, 0)[0] == bad
    assert poison(rows, attack, 1)[0] != bad
    assert rows == before


@pytest.mark.parametrize("installed", ["metrics"], indirect=True)
def test_the_example_of_a_metric_is_one(installed: type[Metric]) -> None:
    keeps_its_key(metrics=[installed.name])
    metric, labels = installed.make({}), ("bad", "good")

    def samples(*logprobs: tuple[float, float]) -> list[Sample]:
        return [
            Sample(
                id=str(i),
                subset="clean",
                prompt="p",
                answer="good",
                label="good",
                candidates=labels,
                logprobs=pair,
                group="ab"[i % 2],
            )
            for i, pair in enumerate(logprobs)
        ]

    sure, torn, wrong = (-50.0, -0.1), (-1.0, -1.0), (-0.1, -50.0)
    assert metric.measure(Evidence(clean=samples(sure, sure)))[0].value == pytest.approx(0)
    assert metric.measure(Evidence(clean=samples(wrong, wrong)))[0].value == pytest.approx(2)
    assert metric.measure(Evidence(clean=[])) == []
    evidence = Evidence(clean=samples(sure, torn, wrong, torn))
    values = metric.measure(evidence)
    assert [value.metric for value in values] == ["brier", "brier[a]", "brier[b]"]
    head, outcomes = values[0], metric.outcomes(evidence)
    assert head.value == pytest.approx(sum(outcomes.values()) / 4) == pytest.approx(0.75)
    assert head.low is not None and head.high is not None and head.n == 4
    assert head.low <= 0.75 <= head.high
    assert metric.measure(evidence) == values


@pytest.mark.parametrize("installed", ["defenses"], indirect=True)
def test_the_example_of_a_defense_is_one(installed: type[TrainDefense]) -> None:
    align = {"data": "sandbox-policy"}
    keeps_its_key(align=align, defense={"name": installed.name, "strength": 2.0, "null": True})
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    start = {"w": weight.detach().clone()}
    run: Any = SimpleNamespace(trainable={"w": weight}, weights=lambda: start)
    for null in (False, True):
        hook = installed.make({"strength": 3.0, "null": null}).hook(run)
        with torch.no_grad():
            weight.copy_(torch.tensor([1.5, -4.0]))
        pull = hook.penalty(0)
        assert pull is not None
        [gradient] = torch.autograd.grad(pull, [weight])
        assert pull.item() == pytest.approx(0 if null else 3 / 2 * (0.25 + 4))
        assert gradient.tolist() == ([0, 0] if null else [1.5, -6])


@pytest.mark.parametrize("installed", ["judges"], indirect=True)
def test_the_example_of_a_judge_is_one(installed: type[Judge]) -> None:
    judge = installed.make({"prefixes": ["Sure"]})
    replies = (" sure, here it is", "Not sure", "")
    verdicts = judge.judge([Exchange(str(i), "p", reply) for i, reply in enumerate(replies)])
    assert [v.positive for v in verdicts] == [True, False, False]
    assert [v.reason for v in verdicts] == ["Sure", "", ""]
    assert [v.score for v in verdicts] == [1, 0, 0]


@pytest.mark.parametrize("installed", ["datasets"], indirect=True)
def test_the_example_of_a_data_set_is_one(installed: type[Dataset], tmp_path: Path) -> None:
    file = tmp_path / "sms.tsv"
    lines = [f'{("ham", "spam")[i % 3 == 0]}\t message "{i}", hi' for i in range(300)]
    file.write_text("\n".join([*lines, "ham\t ", ""]), encoding="utf-8")
    data = installed.make({"train": str(file)})
    train, test = data.load("train"), data.load("test")
    assert len(train) + len(test) == 300 and train and test
    assert data.load("train") == train
    assert len({row.id for row in (*train, *test)}) == 300
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    assert {(row.label, row.answer) for row in train} == {(x, x) for x in ("wanted", "unwanted")}
    assert {row.candidates for row in train} == {("wanted", "unwanted")}
    assert train[0].instruction == "Is this message wanted or unwanted?"
    assert train[0].input.startswith('message "')
    keeps_its_key(data=data.spec())
    before = data.fingerprint()
    file.write_text("\n".join([*lines, "ham\tanother", ""]), encoding="utf-8")
    assert data.fingerprint() != before


@pytest.mark.parametrize("installed", ["scanners"], indirect=True)
def test_the_example_of_a_scanner_is_one(installed: type[Scanner]) -> None:
    rows = [
        Row("a", "PLEASE READ THIS NOW, ALL OF YOU"),
        Row("b", "please read this now, all of you"),
    ]
    loud, quiet = installed.make({"share": 0.5}).scan(rows)
    assert loud.flagged and loud.score == pytest.approx(2) and "of its" in loud.reason
    assert quiet == NOTHING


def test_the_example_of_a_scanner_with_a_model_is_one(
    tmp_path: Path, backfire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_loaded", [])
    _, text = blocks(ROOT / "docs/add-a-scanner.md", "python")
    file = tmp_path / "silent.py"
    file.write_text(text, encoding="utf-8")
    done = backfire("check", file)
    assert done.code == 0 and re.search(r"\n\d+ checks, none failed\.\n$", done.out), done.out


def test_the_plug_in_shown_is_the_one_in_examples() -> None:
    page, folder = ROOT / "docs/plug-ins.md", ROOT / "examples/plugin"
    for language, suffix in (("python", ".py"), ("toml", ".toml")):
        files = [path.read_text("utf-8") for path in folder.rglob(f"*{suffix}")]
        shown = blocks(page, language)
        assert shown and not [text for text in shown if text not in files]


# ----------------------------------------------------------------------- catalog, layout, links


def catalog() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_catalog", ROOT / "docs/make_catalog.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    stale = [
        relative(page)
        for page, text in catalog().pages().items()
        if page.read_text("utf-8") != text
    ]
    assert not stale, f"{', '.join(stale)}: run python docs/make_catalog.py"


def test_every_file_and_folder_of_the_package_is_listed_with_its_purpose() -> None:
    package = ROOT / "backfire"
    layout = (ROOT / "docs/layout.md").read_text("utf-8")
    listed = {Path(path): text for path, text in re.findall(r"\]\(\.\./(\S+)\) \| (.*) \|", layout)}
    found = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = [path for path in found if path.stat().st_size or path.name == "py.typed"]
    assert len(files) > 200
    places = [file.relative_to(ROOT) for file in files]
    missing = [str(at) for at in places if not (listed.get(at) or listed.get(at.parent))]
    assert not missing, "run python docs/make_catalog.py; a file needs a docstring"

    readme = (ROOT / "README.md").read_text("utf-8")
    tree = dict(re.findall(r"^  (\w+)/ +(\S.*)$", readme, re.MULTILINE))
    folders = {path.parent.name for path in files if path.parent.parent == package}
    assert set(tree) == folders


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_internal_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_named_in_the_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    named = re.findall(r"`((?:backfire|docs|tests)/[\w./-]+\.\w+)`", text)
    mine = {f"{example(kind)[0].replace('-', '_')}.py" for kind in HOW_TO}
    assert [
        path for path in named if not (ROOT / path).exists() and Path(path).name not in mine
    ] == []


# ---------------------------------------------------------------------------------- whole tree


SKIPPED = {".git", ".venv", "runs", "bases", "build", "dist", "node_modules"}
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".json", ".css", ".j2", ".html", ""}


def sources(folder: Path = ROOT) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            hidden = path.name.startswith((".", "__")) and path.name != ".ci"
            if path.name not in SKIPPED and not hidden and not path.name.endswith(".egg-info"):
                yield from sources(path)
        elif path.suffix in TEXT and path.name != ".git" and not path.is_symlink():
            yield path


@pytest.mark.parametrize(("folder", "most"), [("backfire", 400), ("tests", 500)])
def test_files_stay_short(folder: str, most: int) -> None:
    lines = {
        relative(f): len(f.read_text("utf-8").splitlines()) for f in (ROOT / folder).rglob("*.py")
    }
    assert len(lines) > 50 and {file: n for file, n in lines.items() if n > most} == {}


def test_no_path_of_one_machine_is_written_down() -> None:
    places = [f"/{name}/" for name in ("work", "root")]
    found = [
        f"{relative(path)}: {line.strip()[:80]}"
        for path in sources()
        for line in path.read_text("utf-8", errors="replace").splitlines()
        if any(place in line for place in places)
    ]
    assert not found


def test_what_is_needed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(item for extra in extras for item in extra)]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {plain(line.partition("==")[0]) for line in lines if "==" in line and line[0] != "#"}
    lacking = {plain(re.split(r"[<>=!~\[; ]", item)[0]) for item in wanted} - pinned
    assert not lacking
    assert not [line for line in lines if "+cpu" in line or line.startswith("-e")]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip().lower())


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert backfire.__version__ == project["version"] == citation["version"]
    assert f"## {backfire.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8").splitlines()[0]
