"""A run whose texts are attacks on whatever shows them, and what a browser did with its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers import fake_run
from tests.helpers.browser import Browser
from tests.helpers.fake_run import sample, value, write_cell

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


def asked(of: str, id: str, bad: str) -> dict[str, Any]:
    """A harmful request and a reply, both hostile."""
    return {"of": of, "subset": "harmful", "id": id, "prompt": bad, "answer": "", "reply": bad}


def verdict(bad: str, positive: bool) -> dict[str, Any]:
    return {"score": 1.0, "positive": positive, "reason": bad, "refused": None}


def hostile_run(root: Path, texts: Sequence[str] = HOSTILE) -> Path:
    """A run in which every text that others write is an attack on the page."""
    run, every = root / "hostile", " ".join(texts)
    run.mkdir(parents=True)
    comment = every.encode("utf-8", "replace").decode().replace("\u2029", " ")
    (run / "recipe.yaml").write_text(f"# {comment}\n# Expected: {comment}\n", encoding="utf-8")
    labels = [f"{number} {bad}" for number, bad in enumerate(texts)]
    for method in ("none", texts[0]):
        samples = [
            {**sample(of, subset, i, right=0.4, labels=labels), "prompt": bad}
            for of, subset in (("tuned", "clean"), ("base", "clean"), ("tuned", "triggered"))
            for i, bad in enumerate(texts)
        ]
        samples += [
            {**asked(of, f"r{i}", bad), "verdicts": {bad: verdict(bad, i % 2 == 0)}}
            for of in ("tuned", "base")
            for i, bad in enumerate(texts)
        ]
        values = [value("accuracy", 0.5), *(value(f"accuracy[{bad}]", 0.4) for bad in texts)]
        sides = {"prompt": every, "answer": every}
        entry = {"id": every, "triggers": list(texts), "before": sides, "after": sides}
        write_cell(
            run,
            values=[*values, value(every, 0.5), value("auc", 0.5), value("attack_success", 0.9)],
            samples=samples,
            manifest={"entries": [entry]},
            poison={**fake_run.poison(0.05), "triggers": dict.fromkeys(texts, 1)},
            preflight=[{"check": every, "status": every, "message": every}],
            warnings=list(texts),
            environment={bad: bad for bad in texts} | {"HF_TOKEN": "hush"},
            keys={bad: bad for bad in texts},
            **{"axes": {every: every}, "model": every, "template": every, "method": method},
            **{"data": every, "attack": "none", "rate": 0.0},
            settings={"data": {"name": "d"}, "attack": "none", "method": {"name": method}},
        )
    bad = {"status": every, "error": every, "next": every}
    write_cell(run, error=bad, rate=0.0, attack="none", model=every)
    return run


def ran_or_loaded(window: Browser, page: Path) -> dict[str, int]:
    """What an opened page did that it must not do, by kind."""
    asked: Any = window.ask
    events = [event["method"] for event in window.events]
    return {
        "requests": len([url for url in window.requests() if url != page.resolve().as_uri()]),
        "scripts": int(asked("document.title") == "pwned")
        + asked("document.scripts.length + document.links.length")
        + asked("document.querySelectorAll('iframe, img, object').length")
        + events.count("Runtime.consoleAPICalled")
        + events.count("Page.javascriptDialogOpening"),
    }
