"""Components from outside the package: from a file, or from an installed package."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backfire import plugins, registry
from backfire.errors import UserError
from backfire.experiment import Experiment
from backfire.registry import build, find, names
from backfire.results.load import cell as read_back
from backfire.results.plugins import lacking
from backfire.stages import cell_key
from backfire.store import read_json
from tests.helpers.fake_run import write_cell

EXAMPLE = Path(__file__).parents[1] / "examples/plugin"
ATTACK = (EXAMPLE / "my_attacks/suffix.py").read_text("utf-8")


@pytest.fixture(autouse=True)
def _as_if_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plug-in is loaded before a test or after it."""
    before = set(sys.modules)
    monkeypatch.setattr(registry, "_loaded", [])
    forget()
    yield
    forget()
    for module in set(sys.modules) - before:
        if module.startswith(("my_attacks", "backfire_plugin_")):
            del sys.modules[module]


def forget() -> None:
    """Installed packages are looked for again."""
    plugins.packages.cache_clear()
    plugins.from_package.cache_clear()


@pytest.fixture
def attack(tmp_path: Path) -> Path:
    """The attack of the example as a single file."""
    file = tmp_path / "suffix.py"
    file.write_text(ATTACK, encoding="utf-8")
    return file


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example package in a folder on the path, with the metadata that pip would write."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    shutil.copytree(EXAMPLE / "my_attacks", folder / "my_attacks")
    info = folder / f"my_attacks-{project['version']}.dist-info"
    info.mkdir()
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(about)
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["backfire"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[backfire]", *lines, ""]))
    monkeypatch.syspath_prepend(str(folder))
    return folder / "my_attacks"


# ---------------------------------------------------------------------------------- one file


def test_a_file_adds_a_component_whose_identity_holds_its_content(attack: Path) -> None:
    plugin = plugins.load(str(attack))
    registry.use(plugin)
    registry.use(plugins.load(str(attack)))  # a second time is the same
    assert (plugin.name, plugin.version, plugin.path) == ("suffix.py", "", attack.resolve())
    assert "suffix" in names("attacks") == sorted(names("attacks"))
    assert find("attacks", "suffix").plugin == plugin
    with pytest.raises(UserError, match="Unknown attack 'sufix'; did you mean 'suffix'"):
        find("attacks", "sufix")
    before = build("attacks", "suffix").identity()
    assert before == {"name": "suffix", "version": 1, "plugin": plugin.sha256}
    assert "plugin" not in build("attacks", "badnets").identity()
    attack.write_text(ATTACK + "\n# edited\n", encoding="utf-8")
    registry._loaded.clear()
    registry.use(plugins.load(str(attack)))
    assert build("attacks", "suffix").identity() != before


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("a.py", "x = (\n", r"'a.py' cannot be loaded: SyntaxError: '\(' was never closed \(a.py"),
        ("l.py", "x = '\0'\n", r"SyntaxError: .*null bytes \(l.py, line 1\)"),
        ("b.py", "\nimport nowhere\n", r"No module named 'nowhere' \(b.py, line 2\)"),
        ("c.py", "def f():\n    1 / 0\nf()\n", r"ZeroDivisionError: .*\(c.py, line 2\)"),
        ("d.py", "raise SystemExit(3)", r"'d.py' cannot be loaded: SystemExit: 3 \(d.py, line 1"),
        ("e.py", "x = 1\n", r"'e.py' has no component; mark a class with @register"),
        (
            "f.py",
            "from backfire.registry import register\n@register('x')\nclass Thing: ...\n",
            r"'f.py': 'Thing' does not derive from a base class of backfire.base, such as Attack",
        ),
        (
            "g.py",
            ATTACK.replace('"suffix"', '"badnets"'),
            r"attack 'badnets' already exists in backfire",
        ),
        (
            "h.py",
            ATTACK.replace('"suffix"', '"My_Attack"'),
            r"'My_Attack' is not a valid name; use lowercase",
        ),
        ("i.py", ATTACK.replace('"suffix"', '"none"'), r"'none' is not a valid name"),
        ("j.py", ATTACK + ATTACK.replace("class Suffix", "class Other"), r"is registered twice"),
        ("k.txt", ATTACK, r"ending in \.py \(got .*k.txt\)"),
    ],
)
def test_errors_of_a_plug_in_are_one_sentence(
    name: str, code: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(code, encoding="utf-8")
    with pytest.raises(UserError, match=sentence) as caught:
        registry.use(plugins.load(str(tmp_path / name)))
    assert "\n" not in str(caught.value) and str(caught.value)[0].isupper()
    assert registry.loaded() == []


def test_no_file_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such plug-in file"):
        plugins.load(str(tmp_path / "x.py"))
    with pytest.raises(UserError, match="is a folder"):
        plugins.load(str(tmp_path))
    with pytest.raises(UserError, match="Unknown installed plug-in 'nothing'"):
        plugins.load("nothing")


def test_two_plug_ins_with_one_name(attack: Path) -> None:
    other = attack.with_name("other.py")
    other.write_text(ATTACK + "\n", encoding="utf-8")
    registry.use(plugins.load(str(attack)))
    with pytest.raises(
        UserError, match=r"'other.py': attack 'suffix' already exists in plug-in 'suffix"
    ):
        registry.use(plugins.load(str(other)))


def test_another_process_gets_the_code_that_this_one_has_read(attack: Path) -> None:
    registry.use(plugins.load(str(attack)))
    experiment = Experiment.make({"data": "sandbox-reviews", "attack": "suffix"})
    sent = pickle.dumps([registry.loaded(), experiment])
    attack.unlink()
    code = (
        "import pickle, sys; from backfire import registry, stages\n"
        "plugins, experiment = pickle.load(sys.stdin.buffer)\n"
        "for plugin in plugins: registry.use(plugin)\n"
        "print(stages.cell_key(experiment))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.decode().strip() == cell_key(experiment)


# ------------------------------------------------------------------------- an installed package


def test_an_installed_package_is_loaded_when_a_name_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path, monkeypatch)
    assert find("attacks", "badnets") and "my_attacks" not in sys.modules
    found = find("metrics", "label-probability")
    [plugin] = registry.loaded()
    assert found.plugin == plugin and (plugin.name, plugin.version) == ("my-attacks", "0.1.0")
    assert plugin.facts()["components"] == ["attack 'suffix'", "metric 'label-probability'"]
    assert plugin.facts({"suffix"})["components"] == ["attack 'suffix'"]
    assert plugins.load("my-attacks") is plugin
    assert plugins.load("my_attacks").sha256 == plugins.load("suffix").sha256 == plugin.sha256
    # Every file of the package counts, whether it is code or not, but for what Python caches.
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    forget()
    assert plugins.from_package("my-attacks").sha256 == plugin.sha256
    (folder / "words.txt").write_text("cf\n")
    forget()
    assert plugins.from_package("my-attacks").sha256 != plugin.sha256


def test_a_broken_package_stops_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path, monkeypatch)
    (folder / "suffix.py").write_text("import nowhere\n")
    assert find("attacks", "badnets")
    with pytest.raises(UserError) as caught:
        find("attacks", "suffix")
    assert str(caught.value).startswith("Unknown attack 'suffix'; ")
    assert str(caught.value).endswith(
        "Plug-in 'my-attacks' cannot be loaded: No module named 'nowhere' (suffix.py, line 1)."
    )


# --------------------------------------------------------------------------- the command line


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two cells with the example's components, in a separate folder."""
    file = tmp_path / "work" / "sure.yaml"
    file.parent.mkdir()
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("BACKFIRE_CACHE", str(tmp_path / "cache"))
    file.write_text(
        f"# Is it sure?\nmodel: {tiny}\ntemplate: sentiment-line\nattack: suffix\n"
        "data: {name: sandbox-reviews, rows: 40, test_rows: 20}\n"
        "metrics: [label-probability, accuracy]\ntrain: {max_steps: 2, batch_size: 8}\n"
        "matrix: {method: [full, none]}\n"
    )
    return file


def test_an_installed_plug_in_from_check_to_report(
    backfire: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        install(tmp_path, patch)
        checked = backfire("check", "my-attacks")
        assert (checked.code, checked.err) == (0, "")
        assert "ok    attack 'suffix': It poisons exactly its share of the rows" in checked.out
        assert re.search(r"\n2\d checks, none failed\.\n$", checked.out)
        assert re.search(
            r"suffix +\[plug-in 'my-attacks'\] A word", backfire("list", "attacks").out
        )
        assert "(version 1, from plug-in 'my-attacks')" in backfire("show", "suffix").out
        assert '"attacks-suffix"' in backfire("schema").out
        assert "SUDO" in backfire("validate", recipe).out
        assert backfire("run", recipe, "--workers", 1).code == 0
        [plugin] = registry.loaded()
        for cell in Path("runs/sure/cells").iterdir():
            assert read_json(cell / "result.json")["plugins"] == [plugin.facts()]
        assert read_json(Path("runs/sure/run.json"))["plugins"] == [plugin.facts() | {"path": None}]
        page = Path("runs/sure/report.html").read_text("utf-8")
        assert f"version 0.1.0, sha256 {plugin.sha256[:12]}: attack" in page
        assert "is not loaded" not in page
        assert "20 pairs" in backfire("compare", *Path("runs/sure/cells").iterdir()).out
    monkeypatch.setattr(registry, "_loaded", [])
    forget()
    assert backfire("report", "runs/sure").code == 0
    page = Path("runs/sure/report.html").read_text("utf-8")
    assert "which is not loaded; pass its file with --plugin" in page
    assert "label probability" in page
    shown = backfire("results", "runs/sure")
    assert shown.code == 0 and "label_probability" in shown.out
    cell = next(Path("runs/sure/cells").iterdir())
    for line in (["chat", cell], ["export", cell], ["export", "runs/sure", "--results", "lm-eval"]):
        ended = backfire(*line)
        assert ended.code == 2 and "run with plug-in 'my-attacks' (version 0.1.0" in ended.err
    assert "Unknown attack 'suffix'" in backfire("validate", recipe).err


def test_a_file_is_named_on_the_command_line(
    backfire: Callable[..., Any], recipe: Path, attack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ["--plugin", attack, "metrics=accuracy"]
    assert backfire("run", recipe, *ours, "--workers", 1).code == 0
    [plugin] = read_json(Path("runs/sure/run.json"))["plugins"]
    assert (plugin["name"], plugin["path"]) == ("suffix.py", str(attack))
    cells = sorted(Path("runs/sure/cells").iterdir())
    changed = attack.with_name("edited.py")
    changed.write_text(ATTACK + "# edited\n", encoding="utf-8")
    changed = changed.rename(attack.parent / "work" / "suffix.py")
    for file, sentence in ((attack, ""), (changed, "whose code has since changed")):
        monkeypatch.setattr(registry, "_loaded", [])
        ended = backfire("compare", *cells, "--plugin", file)
        assert ended.code == 0 and "20 pairs" in ended.out  # accuracy needs no attack
        assert sentence in ended.out and ("run with plug-in" in ended.out) is bool(sentence)
    monkeypatch.setattr(registry, "_loaded", [])
    planned = backfire("run", recipe, "--plugin", changed, "metrics=accuracy", "--dry-run")
    assert "train        2 distinct, 1 done" in planned.out  # the clean one


def test_a_result_may_hold_anything_about_plug_ins(tmp_path: Path) -> None:
    odd: dict[str, Any] = {"sha256": "x" * 999, "name": ["<b>\x1b[1m"], "version": {}}
    for number, plugins_ in enumerate((None, 3, {}, [1, None, {"sha256": 5}])):
        cell = read_back(write_cell(tmp_path / "r", plugins=plugins_, seed=number))
        assert cell.plugins == () and lacking([cell]) == []
    [sentence] = lacking([read_back(write_cell(tmp_path / "r", plugins=[odd, odd], seed=9))])
    assert len(sentence) < 300 and "\x1b" not in sentence


def test_check_reports_what_fails(backfire: Callable[..., Any], tmp_path: Path) -> None:
    bad = ATTACK.replace("{row.part(self.field)} {self", "{rng.random()} {self")
    bad, count = re.subn(r'(trigger: Trigger = "SUDO"\n) +""".*?"""\n', r"\1", bad)
    assert count == 1
    file = tmp_path / "bad.py"
    file.write_text(bad.replace("2024", "").replace("2311.14455", ""), encoding="utf-8")
    ended = backfire("check", file)
    assert ended.code == 1 and ended.err == ""
    failed = [line for line in ended.out.splitlines() if line.startswith("fail")]
    assert any("no docstring under trigger" in line for line in failed)
    assert any("names a paper or a year" in line for line in failed)
    assert ended.out.endswith(f"{len(ended.out.splitlines()) - 1} checks, {len(failed)} failed.\n")
    monkey = tmp_path / "broken.py"
    monkey.write_text("import nowhere", encoding="utf-8")
    for line in (["check", monkey], ["list", "--plugin", monkey], ["check", "nothing"]):
        assert backfire(*line).code == 2
    assert "Plug-in 'broken.py' cannot be loaded" in backfire("list", "--plugin", monkey).err


def test_check_knows_the_units(backfire: Callable[..., Any], tmp_path: Path) -> None:
    file, code = tmp_path / "metric.py", (EXAMPLE / "my_attacks/label_probability.py").read_text()
    code = code.replace('"label-probability"', '"furlongs"').replace(
        'averages(["label_probability"]', 'averages(["furlongs"]'
    )
    assert '"higher", "share")' in code
    file.write_text(code.replace('"share")', '"furlongs")'), encoding="utf-8")
    ended = backfire("check", file)
    assert ended.code == 1 and "the unit of 'furlongs' is 'furlongs'; known: share, " in ended.out


def test_a_broken_package_does_not_stop_list(
    backfire: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (install(tmp_path, monkeypatch) / "suffix.py").write_text("import nowhere\n")
    ended = backfire("list", "attacks")
    assert ended.code == 0 and "badnets" in ended.out
    assert "Plug-in 'my-attacks' cannot be loaded: No module named 'nowhere'" in ended.out
