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
from backfire.results.load import load, summary
from tests.helpers import browser
from tests.helpers.fake_run import dose_run, free_run, sample, tuned_run, value, write_cell
from tests.helpers.hostile import HOSTILE, hostile_run, ran_or_loaded
from tests.helpers.page_parser import Seen

pytestmark = pytest.mark.slow

TAGS = frozenset(
    re.findall(
        r"\w+",
        "html head meta title style body main header section footer h1 h2 h3 p ul ol li dl dt dd "
        "div span small b i em mark code table thead tbody tr th td details summary figure "
        "figcaption svg g path use text tspan defs clippath rect",
    )
)


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
                assert not any(ran_or_loaded(window, path).values())


DEEP = "[" * 3000 + "]" * 3000
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{k}: *a{n - 1}' for k in range(10))}}}\n" for n in range(1, 9)
)


@pytest.mark.parametrize("name", ["accuracy", "nothing"])
def test_a_cell_with_damaged_files_is_read_as_far_as_it_goes(name: str, tmp_path: Path) -> None:
    damaged: list[tuple[str, str]] = [
        *(("experiment.yaml", bad) for bad in ("a: &x {b: *x}", f"a: {DEEP}", BOMB)),
        *(("experiment.yaml", bad) for bad in ("metrics: 5", "safety: {judges: 5}")),
        ("experiment.yaml", "attack: {name: [x]}"),
        *(("environment.json", bad) for bad in ("[1]", f'{{"a": {DEEP}}}', '"x"')),
        *((file, f'{{"a": {DEEP}}}') for file in ("poison.json", "secrets.json", "result.json")),
    ]
    fields: list[dict[str, Any]] = [
        *({"rows": {"train": bad}} for bad in ("x", None, [1], 1e999)),
        *({"train": {"seconds": bad}} for bad in ("x", [1])),
        {"axes": {"attack.rate": json.loads("[" * 400 + "]" * 400)}},
    ]
    verdicts = [{"a": {"foo": 1}, "b": {"foo": 2}}, {"a": {"score": "x", "positive": "x"}}]
    rows = [{**sample("tuned", "clean", n, right=1.0), "verdicts": verdicts[n]} for n in range(2)]
    values, run = [value(name, 0.5)], tmp_path / "r"
    for seed, (file, content) in enumerate(damaged):
        (write_cell(run, values=values, seed=seed) / file).write_text(content)
    for seed, more in enumerate(fields, len(damaged)):
        write_cell(run, values=values, seed=seed, samples=rows, **more)
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("Its result cannot be read: it is nested too deeply.") == 1
    assert len(load(run)) == len(damaged) + len(fields)
