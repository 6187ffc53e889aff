"""Model outputs and data that attack the report, the CSV file and the terminal."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections import Counter
from pathlib import Path
from random import Random

from backfire.report.page import write_report
from backfire.results import load
from tests.helpers import browser
from tests.helpers.hostile import HOSTILE, hostile_run, ran_or_loaded
from tests.helpers.outputs import printed
from tests.torture.row import Figures, Ground, NotHere, row

PAYLOADS = (
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=document.title='pwned'>",
    "<svg/onload=document.title='pwned'>",
    "<svg><script>document.title='pwned'</script></svg>",
    "<iframe srcdoc=\"<script>parent.document.title='pwned'</script>\"></iframe>",
    "<a href=\"javascript:document.title='pwned'\">x</a>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    "<style>@import 'http://127.0.0.1:9/x.css'; body{background:url(http://127.0.0.1:9/x)}</style>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<base href=http://127.0.0.1:9/><img src=x>",
    "<object data=http://127.0.0.1:9/x></object><embed src=http://127.0.0.1:9/x>",
    "<video poster=http://127.0.0.1:9/x><source onerror=document.title='pwned'></video>",
    "<details open ontoggle=document.title='pwned'>x</details>",
    "<input autofocus onfocus=document.title='pwned'>",
    "<form action=http://127.0.0.1:9/><button formaction=javascript:alert(1)>x</button></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=document.title='pwned'>",
    "&lt;script&gt;document.title='pwned'&lt;/script&gt;",
    "<scr\0ipt>document.title='pwned'</scr\0ipt>",
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}{% include 'page.css' %}",
    '=HYPERLINK("http://127.0.0.1:9/","x")',
    "\x1b]8;;http://127.0.0.1:9/\x07link\x1b]8;;\x07\x1b[2J\x9b31m",
)
OPENINGS = (
    *("", "</td></tr></table>", "</script>", "'\">", "-->", "]]>", "</style>", "</title></svg>"),
    *("</textarea>", "`", "\u2028", "\ud800", "\u202e", "+", "-", "@", "\t=", "\r=", '\\" ', "%00"),
)
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PER_RUN = 10


def texts(count: int) -> list[str]:
    """The texts of the tests, then payloads behind openings that leave a context."""
    made = [opening + payload for payload in PAYLOADS for opening in OPENINGS]
    Random(0).shuffle(made)
    return [*HOSTILE, *made][:count]


@row(
    "Model outputs, prompts, labels, settings and messages that attack a page, a table or a "
    "terminal are reported; the page is opened in headless Chromium, the CSV file is read back, "
    "and what a terminal would get is searched for control characters.",
    full=200,
    small=20,
    zero=("scripts", "requests", "formulas", "control_characters"),
    some=("pages", "texts", "csv_cells"),
)
def hostile_outputs(count: int, ground: Ground) -> Figures:
    if browser.find() is None:
        raise NotHere("there is no Chromium here")
    found, every = Counter[str](), texts(count)
    with browser.Browser(ground.root / "profile") as window, contextlib.chdir(ground.root):
        for number in range(0, len(every), PER_RUN):
            some = every[number : number + PER_RUN]
            run = hostile_run(ground.root / str(number), some)
            page = write_report(run)
            window.open(page, width=1000)
            window.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
            found += Counter(ran_or_loaded(window, page))
            cells = _csv_cells(run)
            found["formulas"] += sum(map(_is_formula, cells))
            shown = printed(run, is_terminal=False) + load.write(load.records(run), "table")
            found["control_characters"] += len(OBEYED.findall(shown + page.read_text("utf-8")))
            found["csv_cells"] += len(cells)
            found["texts"] += len(some)
            found["pages"] += 1
    found["scripts"] += (ground.root / "pwned").exists()
    names = ("texts", "pages", "csv_cells", "scripts", "requests", "formulas", "control_characters")
    return {name: found[name] for name in names}


def _csv_cells(run: Path) -> list[str]:
    text = load.write(load.records(run), "csv")
    return [cell for line in csv.reader(io.StringIO(text)) for cell in line]


def _is_formula(cell: str) -> bool:
    """Whether a spreadsheet would compute this cell; negative numbers are numbers."""
    return cell[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"-[\d.e-]+", cell)
