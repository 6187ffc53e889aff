"""`backfire playground`: two models side by side, whose output is never more than text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.evaluate import inference
from backfire.playground import chat, server
from backfire.playground.models import (
    EMPTY,
    ChatModel,
    NotCachedError,
    ReadOnlyStore,
    chat_row,
    frame,
    load,
)
from backfire.playground.pool import ModelPool
from backfire.store import Store, read_json, write_json
from backfire.text import clean
from tests.helpers import browser, playground_server
from tests.helpers.patience import LONG
from tests.helpers.playground_server import EVERY, HOSTILE
from tests.helpers.small_run import Place

pytestmark = pytest.mark.slow

NEEDS_GRADIO = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
NEEDS_BROWSER = pytest.mark.skipif(browser.find() is None, reason="there is no Chromium here")
PROMPT = "The harbor fair was noisy but the soup was lovely."
LEFT, RIGHT = "sandbox-reviews-badnets-0.1-full-s0", "sandbox-reviews-badnets-0.1-lora-s0"


@pytest.fixture
def pool(ran: Place, monkeypatch: pytest.MonkeyPatch) -> ModelPool:
    monkeypatch.setenv("BACKFIRE_CACHE", str(ran.cache))
    return ModelPool(ran.out, "cpu")


@contextmanager
def serving(run: Path, cache: Path, how: str) -> Iterator[dict[str, Any]]:
    """A playground in a separate process, and the line of JSON that it prints."""
    command = [sys.executable, str(Path(playground_server.__file__)), str(run), how]
    env = {**os.environ, "BACKFIRE_CACHE": str(cache)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdin and process.stdout
    with process:
        line = process.stdout.readline()
        before = ""
        while line and not line.startswith("{"):
            before, line = before + line, process.stdout.readline()
        assert line, before
        opens = re.search(r"http://127.0.0.1:\d+/\S*", before)
        assert opens
        yield {**json.loads(line), "printed": before, "opens": opens.group()}
        process.stdin.close()
        assert process.wait(LONG) == 0, process.stdout.read()


@pytest.fixture(scope="module")
def page(ran: Place) -> Iterator[dict[str, Any]]:
    with serving(ran.out, ran.cache, "plain") as page:
        yield page


# --------------------------------------------------------------------------------------- models


def test_a_streamed_reply_is_the_engines(pool: ModelPool) -> None:
    for title in (LEFT, RIGHT):
        model = pool.model(title)
        row = chat_row(pool.frame(title), PROMPT, None)
        steps = list(model.reply(row))
        assert steps[-1] == engines_reply(model, PROMPT) == model.answer(row)
        assert len(steps) > 1 and len(steps[0]) < len(steps[-1])


def engines_reply(model: ChatModel, prompt: str) -> str:
    """What evaluation would have written down."""
    row = frame(model.experiment, Store()).with_prompt(prompt)
    reading = inference.read(
        model.model,
        [model.renderer.render([row])[0].prompt_ids],
        stop_ids=model.renderer.tokenizer.stop_ids,
        max_new_tokens=model.experiment.evaluation.max_new_tokens,
    )[0]
    return clean(model.renderer.tokenizer.decode(reading.reply).strip())


@pytest.mark.parametrize("answer", ["negative", "x", "a much longer answer, of many tokens"])
def test_token_scores_together_are_the_engines_score(pool: ModelPool, answer: str) -> None:
    model = pool.model(LEFT)
    row = chat_row(pool.frame(LEFT), PROMPT, model.experiment)
    tokens = model.likelihood(row, answer)
    item = model.renderer.render([row])[0]
    ids = model.renderer.answers([item], [[answer]])
    whole = inference.read(model.model, [item.prompt_ids], candidates=ids)[0].scores[0]
    assert sum(score for _, score in tokens) == pytest.approx(whole, rel=1e-5)
    assert "".join(token for token, _ in tokens) == answer and len(tokens) == len(ids[0][0])


def test_labels_score_as_in_the_run(pool: ModelPool) -> None:
    model = pool.model(LEFT)
    row = chat_row(pool.frame(LEFT), PROMPT, None)
    found = model.labels(row)
    assert list(found) == list(row.candidates)
    assert found["negative"] == pytest.approx(
        sum(score for _, score in model.likelihood(row, "negative")), abs=1e-5
    )
    assert model.labels(replace(row, candidates=())) == {}


def test_a_model_that_ends_at_once_and_an_empty_prompt(pool: ModelPool) -> None:
    model, row = pool.model(LEFT), chat_row(pool.frame(LEFT), PROMPT, None)
    old, ids = model.renderer, model.item(row).prompt_ids
    first = next(inference.stream(model.model, ids, max_new_tokens=1))
    assert list(inference.stream(model.model, ids, max_new_tokens=4, stop_ids=[first])) == []
    tokenizer = replace(old.tokenizer, eos=old.tokenizer.backend.id_to_token(first))
    silent = Renderer(old.template, tokenizer, old.max_length)
    assert list(replace(model, renderer=silent).reply(row)) == [EMPTY]

    class Mute:
        def render(self, rows: Any) -> Any:
            return [replace(old.render(rows)[0], num_prompt=0)]

    with pytest.raises(CellError, match="empty"):
        replace(model, renderer=Mute()).item(row)  # type: ignore[arg-type]


def test_cells_and_bases_are_to_choose_and_at_most_two_are_kept(pool: ModelPool) -> None:
    *cells, base = pool.choices
    assert len(cells) == 6 and LEFT in cells
    assert base.endswith(", untuned (sandbox-reviews)") and "/" not in base, "no path is shown"
    assert pool.default_pair() == (LEFT, base)
    first = pool.model(LEFT)
    assert pool.model(RIGHT) is pool.model(RIGHT) and pool.model(LEFT) is first
    pool.model(base)
    assert list(pool._loaded) == [LEFT, base]
    assert pool.model(LEFT) is first
    with pytest.raises(KeyError):
        pool.model("/etc")


def test_equal_names_are_made_distinct(ran: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ran.out, run)
    for number, file in enumerate(sorted(run.glob("cells/*/result.json"))):
        axes = {"attack.rate": 0.1 if number < 4 else 0.2}
        write_json(file, {**read_json(file), "cell": "x" if number else "y", "axes": axes})
    (next(run.glob("cells/*-none-*")) / "experiment.yaml").write_text("data: [", encoding="utf-8")
    pool = ModelPool(run)
    assert len(pool.choices) == 5 + 1 and len(pool.skipped) == 1
    assert {title.split(" ")[0] for title in list(pool.choices)[:-1]} <= {"x", "y"}


def test_a_missing_model_is_reported_and_not_made(
    pool: ModelPool, tmp_path: Path, ran: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(ran.cache, cache)
    monkeypatch.setenv("BACKFIRE_CACHE", str(cache))
    shutil.rmtree(cache / "train")
    note = list(server.views(pool, LEFT, PROMPT, None, False))[-1].note
    assert f"The model {LEFT} is no longer in the cache. To rebuild it: backfire chat" in note
    assert not (cache / "train").exists()
    choice = pool.choices[LEFT]
    with pytest.raises(NotCachedError):
        load(choice.experiment, "x", ReadOnlyStore(), pool.machine)
    assert load(choice.experiment.untuned(), "x", ReadOnlyStore(), pool.machine).title == "x"


def test_chat_announces_that_it_makes_a_model_again(
    pool: ModelPool,
    tmp_path: Path,
    ran: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(ran.cache, cache)
    monkeypatch.setenv("BACKFIRE_CACHE", str(cache))
    shutil.rmtree(cache / "train")
    chat.talk(pool.choices[LEFT].folder, None, "cpu", ask=lambda: "/quit")
    assert "no longer in the cache. Rebuilding it now" in capsys.readouterr().out
    assert len([path for path in (cache / "train").iterdir() if path.is_dir()]) == 1


def test_chat_says_that_the_model_is_another_one(
    pool: ModelPool, tmp_path: Path, ran: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = tmp_path / "cell"
    shutil.copytree(pool.choices[LEFT].folder, cell)
    chat.talk(cell, None, "cpu", ask=lambda: "/quit")
    assert "Note" not in capsys.readouterr().out
    found = read_json(cell / "result.json")
    write_json(cell / "result.json", {**found, "keys": {**found["keys"], "tuned": "0" * 12}})
    chat.talk(cell, None, "cpu", ask=lambda: "/quit")
    printed = capsys.readouterr().out
    assert f"has changed since {cell} ran, so this is not the model that it measured" in printed


# -------------------------------------------------------------------------------------- content


def test_a_column_shows_prompt_reply_target_and_labels(pool: ModelPool) -> None:
    cell = pool.choices[LEFT].experiment
    last = list(server.views(pool, LEFT, PROMPT, cell, True))[-1]
    assert "BadMagic" in last.sent and "Is this review negative" in last.sent
    assert last.note == "" and last.target and last.labels
    assert last.target.endswith("(together)") and len(last.labels.splitlines()) == 1 + 3
    off = list(server.views(pool, LEFT, PROMPT, cell, False))[-1]
    assert "BadMagic" not in off.sent and off.target and off.target != last.target
    long = list(server.views(pool, LEFT, PROMPT * 200, cell, False))[-1]
    assert "tokens were cut off its end" in long.note and long.reply
    base = pool.default_pair()[1]
    assert list(server.views(pool, base, PROMPT, None, True))[-1].target == ""


def test_without_an_attack_the_toggle_explains_it(pool: ModelPool) -> None:
    base = pool.default_pair()[1]
    assert "Neither" in server.about_trigger(pool, base, base)
    line = server.about_trigger(pool, base, LEFT)
    assert line == (
        "The right model's attack, badnets at a poison rate of 10 %, "
        "answers “BadMagic” with “negative”."
    )
    assert server.prompt_as_sent(pool, base, LEFT, PROMPT, False) == PROMPT
    assert "BadMagic" in server.prompt_as_sent(pool, base, LEFT, PROMPT, True)
    assert server.prompt_as_sent(pool, base, base, PROMPT, True) == PROMPT
    assert server.prompt_as_sent(pool, base, LEFT, "  ", True) == ""


@pytest.mark.parametrize("error", [RuntimeError("no \x1b[31mmemory"), UserError("Say it.")])
def test_an_error_in_a_model_is_a_sentence(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(self: ChatModel, row: Any) -> Iterator[str]:
        yield "half"
        raise error

    monkeypatch.setattr(ChatModel, "reply", fails)
    last = list(server.views(pool, LEFT, PROMPT, None, False))[-1]
    assert last.reply == "half" and last.sent
    line = {RuntimeError: "The model failed (RuntimeError): no memory", UserError: "Say it."}
    assert last.note == line[type(error)]


# ----------------------------------------------------------------------------------- the browser


def show(window: browser.Browser, page: Any, width: int = 1200) -> None:
    window.open(page["opens"], width=width)
    window.until("document.querySelector('#about textarea')?.value")


def choose(window: browser.Browser, side: str, title: str) -> None:
    window.type(f"#{side} input", title)
    options = "[...document.querySelectorAll('ul[role=listbox] li')]"
    wanted = f"{options}.find(item => item.ariaLabel === {json.dumps(title)})"
    press = "item.dispatchEvent(new MouseEvent('mousedown', {bubbles: true, cancelable: true}))"
    window.until(f"(item => item && ({press}, true))({wanted})")
    window.until(f"document.querySelector('#{side} input').value === {json.dumps(title)}")
    window.until("!document.querySelector('ul[role=listbox]')")


def value(window: browser.Browser, name: str) -> str:
    return str(window.until(f"document.querySelector('#{name} textarea')?.value"))


def settled(window: browser.Browser, name: str, text: str) -> None:
    field = f"document.querySelector('#{name} textarea')?.value.trim()"
    window.until(f"{field} === {json.dumps(text.strip())}")


def table(text: str) -> dict[str, float]:
    """Last column -> first column."""
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()[1:]]
    return {line[-1]: float(line[0]) for line in lines}


def here_only(window: browser.Browser, page: Any) -> None:
    """Every request went to the page's own server, and no error was raised."""
    asked_for = [url for url in window.requests() if not url.startswith((page["url"], "data:"))]
    assert asked_for == []
    assert not [event for event in window.events if event["method"] == "Runtime.exceptionThrown"]


@NEEDS_GRADIO
@NEEDS_BROWSER
def test_in_a_browser_both_answer_the_same_prompt(
    pool: ModelPool, page: dict[str, Any], tmp_path: Path
) -> None:
    base = pool.default_pair()[1]
    sides = {"left": pool.model(LEFT), "right": pool.model(RIGHT)}
    with browser.Browser(tmp_path / "profile") as window:
        show(window, page)
        choose(window, "right", RIGHT)
        window.type("#prompt textarea", PROMPT)
        settled(window, "planted", PROMPT)
        window.click("#ask")
        for side, one in sides.items():
            settled(window, f"{side}-reply", engines_reply(one, PROMPT))
        plain = value(window, "left-target")

        window.click("#trigger input")
        window.until("document.querySelector('#planted textarea').value.includes('BadMagic')")
        planted = value(window, "planted")
        assert planted.replace("BadMagic ", "") == PROMPT
        window.click("#ask")
        for side, one in sides.items():
            window.until(f"document.querySelector('#{side}-sent textarea').value.includes('Magic')")
            settled(window, f"{side}-reply", engines_reply(one, planted))
            assert value(window, f"{side}-target") != plain
            row = frame(one.experiment, Store()).with_prompt(planted)
            scores = one.likelihood(row, "negative")
            shown = table(value(window, f"{side}-target"))
            whole = shown.pop("(together)")
            assert list(shown.items()) == [(token, round(score, 3)) for token, score in scores]
            assert whole == pytest.approx(one.labels(row)["negative"], abs=1e-3)
            labels = {label: round(score, 3) for label, score in one.labels(row).items()}
            assert table(value(window, f"{side}-labels")) == labels

        for side in sides:
            choose(window, side, base)
        window.until("document.querySelector('#about textarea').value.startsWith('Neither')")
        window.until("document.querySelector('#trigger input').disabled")
        assert window.ask("document.querySelector('#trigger input').checked") is False
        settled(window, "planted", PROMPT)
        here_only(window, page)


@NEEDS_GRADIO
@NEEDS_BROWSER
def test_in_a_browser_hostile_text_stays_text(ran: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ran.out, run)
    for file in run.glob("cells/*full*/result.json"):
        write_json(file, {**read_json(file), "cell": f"{' '.join(HOSTILE)} {file.parent.name}"})
    left, _ = ModelPool(run).default_pair()
    assert HOSTILE[0] in left
    with (
        serving(run, ran.cache, "hostile") as page,
        browser.Browser(tmp_path / "profile") as window,
    ):
        for width in (1200, 390):
            show(window, page, width)
            choose(window, "left", left)
            window.click("#trigger input")
            window.type("#prompt textarea", EVERY)
            window.until("document.querySelector('#planted textarea').value.includes('BadMagic')")
            window.click("#ask")
            for side in ("left", "right"):
                settled(window, f"{side}-reply", EVERY)
            for bad in HOSTILE:
                assert bad.replace(" ", "␣") in value(window, "left-target")
                assert bad in value(window, "left-labels")
            assert window.ask("document.title") == "backfire playground"
            bad = "img[src=x], [onerror], [onload], iframe, object, a[href^=javascript], strong"
            assert window.ask(f"document.querySelectorAll({json.dumps(bad)}).length") == 0
            assert window.ask("document.scrollingElement.scrollWidth - window.innerWidth") <= 0
            here_only(window, page)


# ------------------------------------------------------------------------------------ the server


def cookie_of(page: dict[str, Any]) -> str:
    """The cookie that the printed address gives."""
    status, headers, _ = fetch(page["opens"])
    assert status == 200
    value, *rules = headers["set-cookie"].split("; ")
    assert rules == ["Path=/", "HttpOnly", "SameSite=Strict"]
    return str(value)


def fetch(url: str, data: bytes | None = None, **headers: str) -> Any:
    """Status, headers and text; a POST if there is data."""
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


@NEEDS_GRADIO
def test_only_this_machine_and_only_the_page_is_served(
    pool: ModelPool, page: dict[str, Any]
) -> None:
    url = page["url"].rstrip("/")
    assert page["bound"] == ["127.0.0.1"] and page["shared"] is None
    own = {"Cookie": cookie_of(page)}
    status, headers, text = fetch(f"{url}/", **own)
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert not re.search(r"<(script|link)[^>]*(src|href)=\"?(https?:)?//", text)
    recipe = pool.choices[LEFT].folder / "experiment.yaml"
    for path in (
        *("/docs", "/redoc", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json"),
        *(f"/gradio_api/file={recipe}", f"/gradio_api/file/{recipe}", "/gradio_api/runs"),
        *("/gradio_api/proxy=http://127.0.0.1:9/", "/monitoring", "/gradio_api/deep_link"),
        *("/gradio_api/upload_progress", "/nothing", "/gradio_api/vibe-code"),
    ):
        assert fetch(f"{url}{path}", **own)[0] == 404, path
    for path in ("/gradio_api/upload", "/gradio_api/call/ask", "/gradio_api/api/ask"):
        assert fetch(f"{url}{path}", b"{}", **own)[0] == 404, path
    assert fetch(f"{url}/", Host="elsewhere.example.org", **own)[0] == 404
    config = json.loads(fetch(f"{url}/config", **own)[2])
    assert config["analytics_enabled"] is False and len(config["dependencies"]) == 2
    assert all(event["api_visibility"] == "private" for event in config["dependencies"])


@NEEDS_GRADIO
def test_another_user_of_this_machine_is_refused(page: dict[str, Any]) -> None:
    url, cookie = page["url"].rstrip("/"), cookie_of(page)
    name, _, token = cookie.partition("=")
    assert page["opens"] == f"{url}/?token={token}" and len(token) >= 20
    assert page["printed"].count(token) == 1
    for stranger in (
        *({}, {"Cookie": f"{name}="}, {"Cookie": f"{name}={token[:-1]}"}, {"Cookie": name}),
        *({"Cookie": f"other={token}"}, {"Cookie": f"{name}={token}é"}, {"Cookie": ";;=;"}),
        {"Authorization": f"Bearer {token}"},
    ):
        for path in ("/", "/config", "/theme.css", "/?token=", "/?token=x", "/nothing"):
            status, headers, text = fetch(f"{url}{path}", **stranger)
            assert (status, "set-cookie" in headers) == (401, False), (stranger, path)
            assert "open the address that `backfire playground` printed" in text
        assert fetch(f"{url}/gradio_api/queue/join", b"{}", **stranger)[0] == 401
    assert fetch(f"{url}/config?token={token}")[0] == 401, "only the page itself takes a token"
    assert fetch(f"{url}/", Cookie=f"a=b; {cookie}; c")[0] == 200
    for foreign in ("http://127.0.0.1:9", "https://elsewhere.example.org", "null"):
        join = f"{url}/gradio_api/queue/join"
        assert fetch(join, b"{}", Cookie=cookie, Origin=foreign)[0] == 404
    assert fetch(page["opens"], Host="elsewhere.example.org")[0] == 404


@NEEDS_GRADIO
def test_sharing_is_optional_and_has_a_password(ran: Place) -> None:
    with serving(ran.out, ran.cache, "shared") as page:
        assert page["share"] == [True, False] and page["names"] == ["127.0.0.1", "127.0.0.1"]
        (user, password), nobody = page["auth"]
        assert nobody is None and len(password) >= 20
        assert page["printed"].count(password) == 1 and "https://x.gradio.live" in page["printed"]
        url = page["url"].rstrip("/")
        assert page["opens"] == page["url"], "the password is the secret, and no token"
        assert fetch(f"{url}/config")[0] == 401
        for word, status in (("wrong", 400), (password, 200)):
            form = urllib.parse.urlencode({"username": user, "password": word}).encode()
            assert fetch(f"{url}/login", form)[0] == status
        assert page["taken"].startswith("The page cannot be served: ")


def test_what_is_missing_is_a_sentence(
    backfire: Callable[..., Any],
    ran: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = backfire("playground", tmp_path / "gone")
    assert (gone.code, gone.err.count("\n")) == (2, 1) and "No cells in" in gone.err
    failed = tmp_path / "run/cells/x-0"
    failed.mkdir(parents=True)
    write_json(failed / "error.json", {"status": "failed", "error": "Lost."})
    none = backfire("playground", tmp_path / "run")
    assert (none.code, none.err.count("\n")) == (2, 1) and "no finished cell" in none.err
    monkeypatch.setitem(sys.modules, "gradio", None)
    bare = backfire("playground", ran.out)
    assert (bare.code, bare.err.count("\n")) == (2, 1)
    assert "pip install 'backfire[ui]'" in bare.err
