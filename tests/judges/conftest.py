"""A judge's server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from backfire.judges import _endpoint
from tests.helpers.judge_server import Server
from tests.helpers.patience import LONG


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(_endpoint, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            held.requests.append({"path": self.path, **body})
            held.headers.append(dict(self.headers))
            status, content, headers = held.answer(
                body["messages"][0]["content"], len(held.requests)
            )
            held.goes_on.wait(LONG)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client gave up waiting

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        held = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
        held.goes_on.set()
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield held
        held.goes_on.set()
        http.shutdown()
        thread.join()
