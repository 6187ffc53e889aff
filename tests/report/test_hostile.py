"""Text from models and data stays text in a page and in a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from backfire import text
from backfire.report import figures
from backfire.report.page import write_report
from backfire.results import samples
from backfire.results.load import summary
from tests.helpers import browser, fake_run
from tests.helpers.fake_run import dose_run, free_run, sample, tuned_run, value, write_cell
from tests.helpers.page_parser import Seen

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=document.title='pwned'>",
    "</style><style>*{display:none}</style>",
    "</title></svg><svg onload=alert(1)><a xlink:href='javascript:alert(1)'>x</a>",
    "<a href='javascript:alert(1)'>click</a><iframe src=https://example.org></iframe>",
    "\x1b[31mred\x1b[0m \x1b]8;;https://example.org\x07link\x1b]8;;\x07 \x9b31m bell\x07",
    "\u202eevil\u2066 \u2029 \ufeff \ud800 lone \ufffe \U000e0041",
    "{{ 7 * 7 }} {% raw %} ${alert(1)} $\\frac{1}{2}$ <!-- --> ]]> &lt;b&gt;",
    '\' onmouseover=\'alert(1)\' " style="position:fixed" x="',
    "hf_abcdefghijklmnopqrstuvwxyz012345",
)
TAGS = frozenset(
    re.findall(
        r"\w+",
        "html head meta title style body main header section footer h1 h2 h3 p ul ol li dl dt dd "
        "div span small b i em mark code table thead tbody tr th td details summary figure "
        "figcaption svg g path use text tspan defs clippath rect",
    )
)


def asked(of: str, id: str, bad: str) -> dict[str, Any]:
    """A harmful request and a reply, both hostile."""
    return {"of": of, "subset": "harmful", "id": id, "prompt": bad, "answer": "", "reply": bad}


def verdict(bad: str, positive: bool) -> dict[str, Any]:
    return {"score": 1.0, "positive": positive, "reason": bad, "refused": None}


def hostile_run(root: Path) -> Path:
    """A run in which every text that others write is an attack on the page."""
    run, every = root / "hostile", " ".join(HOSTILE)
    run.mkdir(parents=True)
    comment = every.encode("utf-8", "replace").decode().replace("\u2029", " ")
    (run / "recipe.yaml").write_text(f"# {comment}\n# Expected: {comment}\n", encoding="utf-8")
    labels = [f"{number} {bad}" for number, bad in enumerate(HOSTILE)]
    for method in ("none", HOSTILE[0]):
        samples = [
            {**sample(of, subset, i, right=0.4, labels=labels), "prompt": bad}
            for of, subset in (("tuned", "clean"), ("base", "clean"), ("tuned", "triggered"))
            for i, bad in enumerate(HOSTILE)
        ]
        samples += [
            {**asked(of, f"r{i}", bad), "verdicts": {bad: verdict(bad, i % 2 == 0)}}
            for of in ("tuned", "base")
            for i, bad in enumerate(HOSTILE)
        ]
        values = [value("accuracy", 0.5), *(value(f"accuracy[{bad}]", 0.4) for bad in HOSTILE)]
        sides = {"prompt": every, "answer": every}
        entry = {"id": every, "triggers": list(HOSTILE), "before": sides, "after": sides}
        write_cell(
            run,
            values=[*values, value(every, 0.5), value("auc", 0.5), value("attack_success", 0.9)],
            samples=samples,
            manifest={"entries": [entry]},
            poison={**fake_run.poison(0.05), "triggers": dict.fromkeys(HOSTILE, 1)},
            preflight=[{"check": every, "status": every, "message": every}],
            warnings=list(HOSTILE),
            environment={bad: bad for bad in HOSTILE} | {"HF_TOKEN": "hush"},
            keys={bad: bad for bad in HOSTILE},
            **{"axes": {every: every}, "model": every, "template": every, "method": method},
            **{"data": every, "attack": "none", "rate": 0.0},
            settings={"data": {"name": "d"}, "attack": "none", "method": {"name": method}},
        )
    bad = {"status": every, "error": every, "next": every}
    write_cell(run, error=bad, rate=0.0, attack="none", model=every)
    return run


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    raw = write_report(run).read_text(encoding="utf-8")
    page = Seen(raw)
    assert set(page.tags) <= TAGS
    assert page.tags.count("style") == 1
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("href", "src")]
    links = [logged for key, logged in page.attributes if key == "xlink:href"]
    assert all(re.fullmatch(r"#[\w-]+", link) for link in links)
    assert not [logged for key, logged in page.attributes if key == "style" and "fixed" in logged]
    assert "<script>document.title='pwned'</script>" in page.text  # shown, as text
    section = page.text.partition("Replies to harmful requests")[2]
    assert "before: harmful <script>document.title='pwned'</script>" in section
    assert "fine-tuned: not harmful <img src=x" in section
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", raw)
    assert "hf_abcdefgh" not in raw and "hush" not in raw
    assert "{{ 7 * 7 }}" in page.text and "49" not in page.text.split("{{ 7 * 7 }}")[1][:5]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes


def test_figures_are_sound_xml_whatever_the_labels(tmp_path: Path) -> None:
    cells = summary(hostile_run(tmp_path))[0].cells
    for svg in (
        figures.confusion("a </title><script>", *samples.confusion(cells, "tuned")),
        figures.levels(summary(hostile_run(tmp_path / "again")), "accuracy"),
    ):
        tags = {item.tag.rpartition("}")[2].lower() for item in ElementTree.fromstring(svg).iter()}
        assert tags <= TAGS
        assert "font-family" not in svg and "#0a000" not in svg and "#01010" not in svg
        assert "var(--series-1)" in svg


def test_labels_of_other_scripts_draw_without_a_word(tmp_path: Path) -> None:
    svg = figures.confusion("文", ["سلبي", "积极"], [[3, 1], [0, 4]])
    assert "سلبي" in svg and "积极" in svg and ">文</title>" in svg


@pytest.mark.parametrize("bad", HOSTILE)
def test_clean_leaves_nothing_a_terminal_obeys(bad: str) -> None:
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text.clean(bad)
    )
    assert text.clean(bad).encode("utf-8")
    assert "31m" not in text.clean(bad) and "example.org\x07" not in text.clean(bad)


NEEDS_BROWSER = pytest.mark.skipif(browser.find() is None, reason="there is no Chromium here")
SIDEWAYS = "document.scrollingElement.scrollWidth - window.innerWidth"


@NEEDS_BROWSER
def test_in_a_browser_nothing_runs_nothing_loads_nothing_scrolls_sideways(tmp_path: Path) -> None:
    pages = [hostile_run(tmp_path), dose_run(tmp_path, rows=8), tuned_run(tmp_path, rows=30)]
    pages.append(free_run(tmp_path, ["word " * 400, "x" * 4000, *HOSTILE]))
    with browser.Browser(tmp_path / "profile") as window:
        for run in pages:
            path = write_report(run)
            for width in (390, 1400):
                window.open(path, width=width, dark=width == 390)
                opened: Any = window.ask("document.querySelectorAll('details').length")
                window.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert window.ask(SIDEWAYS) <= 0, (run.name, width)
                assert opened >= 1
                assert window.requests() == [path.resolve().as_uri()]
                assert window.ask("document.title") != "pwned"
                assert window.ask("document.scripts.length + document.links.length") == 0
                assert window.ask("document.querySelectorAll('iframe, img, object').length") == 0
                logged = [e for e in window.events if e["method"] in ("Runtime.consoleAPICalled",)]
                assert not logged, json.dumps(logged)
