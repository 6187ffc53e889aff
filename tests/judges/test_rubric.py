"""A judge behind a server: its requests, its answers, its failures."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from backfire.base import Verdict
from backfire.errors import CellError, Stopped, Unanswered, UserError
from backfire.evaluate.verdicts import judged
from backfire.judges import _endpoint
from backfire.progress import while_waiting
from tests.helpers.judge_server import Answer, Server, bind, completion, rubric
from tests.helpers.judging import exchange, make_judge
from tests.helpers.patience import LONG, until
from tests.helpers.ports import free_port


def test_a_request_is_a_chat_completion(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bind(server, "MY_KEY", monkeypatch)
    monkeypatch.setenv("MY_KEY", "s3cret")
    judge = rubric(server, model="judge-1", max_new_tokens=77)
    [verdict] = judge.judge([exchange("A {prompt} reply.", "An {reply} ask.")])
    assert verdict == Verdict(1.0, False, "Score: 1")
    [request] = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-1", 0, 77)
    asked = request["messages"][0]["content"]
    assert "<request>\nAn {reply} ask.\n</request>" in asked, "put in once, never within another"
    assert "<reply>\nA {prompt} reply.\n</reply>" in asked
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in json.dumps([judge.spec(), judge.identity()])


@pytest.mark.parametrize("name", ["rubric", "yes-no", "classifier"])
def test_a_text_without_the_reply_is_rejected_before_training(name: str) -> None:
    with pytest.raises(UserError, match=r"must contain \{reply\}"):
        make_judge(name, text="Is it harmful? {prompt}").ready(briefly=True)


def test_a_host_that_no_key_is_bound_to_gets_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    rubric(server).judge([exchange("a")])
    assert "Authorization" not in server.headers[0]


def test_answers_come_back_in_order_many_at_a_time(server: Server) -> None:
    server.answer = lambda prompt, count: completion(f"Score: {1 + int(prompt[-1]) % 5}")
    judge = rubric(server, text="{reply}", concurrency=4)
    found = judge.judge([exchange(str(index)) for index in range(10)])
    assert [verdict.score for verdict in found] == [1.0, 2.0, 3.0, 4.0, 5.0] * 2
    assert [verdict.positive for verdict in found] == [False, False, False, False, True] * 2


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It complies.\nScore: 5", 5.0),
        ("It complies.\n\n**Score:** 4", 4.0),
        ("#thereason: plain\n#thescore: 3", 3.0),
        ("score: 2.\n", 2.0),
        ("Score: 6", None),
        ("Score: 45", None),
        ("Score: 4/5", None),
        ("Score: 1\nScore: 5", None),
        ("I would give it a score: 5", None),
        ("The score is five.", None),
        ("", None),
        (None, None),
    ],
)
def test_only_one_clear_grade_is_a_grade(
    server: Server, answer: str | None, score: float | None
) -> None:
    server.answer = lambda prompt, count: completion(answer)
    [verdict] = rubric(server).judge([exchange("a")])
    assert verdict == Verdict(score, None if score is None else score == 5.0, answer or "")


def test_grades_from_four_may_count() -> None:
    assert make_judge("rubric", positive_from=4)._verdict("Score: 4").positive is True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "bad",
    [
        (500, b"oops", {}),
        (503, b"", {}),
        (429, b'{"error": "slow down"}', {"Retry-After": "0"}),
        (429, b"", {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}),
        (200, b"<html>not json</html>", {}),
        (200, b'{"choices": []}', {}),
        (200, b'{"choices": [{"message": {"content": 5}}]}', {}),
    ],
)
def test_what_may_pass_is_tried_again(server: Server, bad: Answer) -> None:
    server.answer = lambda prompt, count: bad if count < 3 else completion("Score: 5")
    assert rubric(server).judge([exchange("a")])[0].positive is True
    assert len(server.requests) == 3
    server.answer = lambda prompt, count: bad
    with pytest.raises(CellError, match=r"chat/completions failed 3 times, last: .+\.") as error:
        rubric(server).judge([exchange("a")])
    assert error.value.kind == "failed" and len(server.requests) == 6
    assert isinstance(error.value, Unanswered) == (bad[0] != 200), "what is no answer stays so"


def test_the_wait_that_a_server_requests_is_observed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    threads = SimpleNamespace(Event=Event, Thread=threading.Thread)
    monkeypatch.setattr(_endpoint, "threading", threads)
    asked = iter(["7", "9999", "nan", "-3"])
    server.answer = lambda prompt, count: (429, b"", {"Retry-After": next(asked)})
    with pytest.raises(CellError):
        rubric(server, retries=3).judge([exchange("a")])
    assert waits == [7.0, 60.0, 0.04]


@pytest.mark.parametrize("status", [None, 503])
def test_a_worker_that_is_to_stop_waits_for_no_server(server: Server, status: int | None) -> None:
    """Neither for its answer nor until it is asked again."""
    if not status:
        server.goes_on.clear()
    server.answer = lambda prompt, count: (status or 200, b"", {"Retry-After": "60"})

    def look() -> None:
        if server.requests:
            raise Stopped

    begun = time.monotonic()
    with while_waiting(look), pytest.raises(Stopped):
        rubric(server, concurrency=1, timeout_seconds=60.0).judge([exchange("a"), exchange("b")])
    assert time.monotonic() - begun < 30 and len(server.requests) == 1


def test_silence_is_given_up(server: Server) -> None:
    server.goes_on.clear()
    with pytest.raises(CellError, match=r"failed 2 times, last: no answer within 0\.1 s"):
        rubric(server, timeout_seconds=0.1, retries=1).judge([exchange("a")])


@pytest.mark.usefixtures("server")
def test_nobody_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        judge = make_judge("rubric", base_url=url, retries=1)
        with pytest.raises(CellError, match="failed 2 times, last: it cannot be reached"):
            judge.judge([exchange("a")])


def test_a_refused_request_is_not_repeated(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda prompt, count: (401, b'{"error": "bad\nkey"}', {})
    with pytest.raises(CellError, match=r"no key is bound to 127.*write HOST: .*HTTP 401: .*bad"):
        rubric(server).judge([exchange("a")])
    bind(server, "OPENAI_API_KEY", monkeypatch)
    with pytest.raises(CellError, match=r"OPENAI_API_KEY is not set\): HTTP 401: .*bad key"):
        rubric(server).judge([exchange("a")])
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    with pytest.raises(CellError, match="contains a key that the server does not accept") as error:
        rubric(server).judge([exchange("a")])
    assert "s3cret" not in str(error.value) and len(server.requests) == 3
    monkeypatch.setenv("OPENAI_API_KEY", "s3c\nret")
    with pytest.raises(UserError, match="OPENAI_API_KEY does not contain a usable key") as unusable:
        rubric(server).judge([exchange("a")])
    assert "s3c" not in str(unusable.value)


def test_a_key_never_follows_a_redirect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bind(server, "OPENAI_API_KEY", monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    server.answer = lambda prompt, count: (302, b"", {"Location": f"{server.url}/elsewhere"})
    with pytest.raises(CellError, match="HTTP 302"):
        rubric(server).judge([exchange("a")])
    assert len(server.requests) == 1


def test_a_proxy_never_sees_what_goes_to_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert rubric(server).judge([exchange("a")])[0].score == 1.0


def test_the_first_failure_stops_the_batch_and_what_was_judged_stays(
    server: Server, tmp_path: Path
) -> None:
    server.answer = lambda prompt, count: completion("Score: 1") if count <= 4 else (400, b"no", {})
    asked = [exchange(str(index)) for index in range(40)]
    judge = rubric(server, concurrency=2)
    with pytest.raises(CellError, match="HTTP 400: no"):
        judged(judge, asked, tmp_path, batch_size=4)
    assert len(server.requests) < 12
    server.answer = lambda prompt, count: completion("Score: 2")
    found = judged(judge, asked, tmp_path, batch_size=4)
    assert [verdict.score for verdict in found] == [1.0] * 4 + [2.0] * 36


@pytest.mark.slow
def test_a_real_server_needs_no_key(tiny: Path, tmp_path: Path) -> None:
    """`transformers serve`, with a model that writes nonsense: asked, answered, undecided."""
    pytest.importorskip("openai", reason="pip install 'transformers[serving]'")
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    place = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "log").open("w+")
    served = subprocess.Popen([sys.executable, "-c", code, *place], stdout=log, stderr=log)

    def listens() -> bool:
        assert served.poll() is None
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens)
        knobs = {"model": str(folder), "timeout_seconds": 120.0}
        judge = make_judge(
            "rubric",
            **knobs,
            base_url=f"http://127.0.0.1:{port}/v1",
            text="{prompt} {reply}",
            max_new_tokens=5,
            retries=8,
        )
        one, two = judge.judge([exchange("Hello."), exchange("Hello.")])
    finally:
        served.terminate()
        served.wait(LONG)
        log.close()
    assert one.positive is None and one.reason == two.reason != ""
