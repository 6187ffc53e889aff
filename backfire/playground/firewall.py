"""Door of the playground's server: who may ask, and for what.

Every request carries the secret that the start of the playground prints: on a shared machine,
anyone can reach a loopback port. Only the page and its events are served; gradio also offers
uploads, files, a proxy and API descriptions, which get a 404.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

_ALLOWED: Final = {
    "GET": r"/|/(assets|static)/.+|/theme\.css|/config/?|/favicon\.ico|/manifest\.json"
    r"|/gradio_api/(startup-events|queue/data|heartbeat/\w+|login_check/?|user/?|token/?|app_id/?)",
    "HEAD": r"/",
    "POST": r"/gradio_api/(queue/join|run/predict|reset|cancel)/?|/login/?",
}
_WITHOUT_TOKEN: Final = "/gradio_api/startup-events"
"""Gradio itself requests it when it starts; the answer is `true` or `false`."""
_LOCAL_HOST: Final = rb"(localhost|127\.0\.0\.1)(:\d+)?"
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS: Final = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
NEEDS_TOKEN: Final = (
    "This page needs its token: open the address that `backfire playground` printed."
)


class Firewall:
    """Refuses strangers and every path that is not allowed, and sets headers against loading
    foreign content.

    With `token`, a request has it in its query or in the cookie that the first one sets. Without,
    gradio's login protects the page (`--share`).
    """

    def __init__(self, app: App, *, token: str | None) -> None:
        self.app, self.token = app, token
        # A name of its own: cookies of all ports of a host are sent to each of them.
        self.cookie = f"backfire-{secrets.token_hex(4)}"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = dict(scope["headers"])
        if self.token and not _from_here(headers):
            return await _answer(send, HTTPStatus.NOT_FOUND, "Not found.")
        if self.token and scope["path"] != _WITHOUT_TOKEN:
            if self._brings_token(scope):
                return await _answer(send, HTTPStatus.OK, "Opening ...", self._exchange())
            if not self._has_cookie(headers):
                return await _answer(send, HTTPStatus.UNAUTHORIZED, NEEDS_TOKEN)
        if not re.fullmatch(_ALLOWED.get(scope["method"], "(?!)"), scope["path"]):
            return await _answer(send, HTTPStatus.NOT_FOUND, "Not found.")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        return await self.app(scope, receive, send_with_headers)

    def _has_cookie(self, headers: dict[bytes, bytes]) -> bool:
        cookies = headers.get(b"cookie", b"").decode("latin-1").split(";")
        pairs = (cookie.strip().partition("=") for cookie in cookies)
        return any(name == self.cookie and self._is_token(value) for name, _, value in pairs)

    def _is_token(self, word: str) -> bool:
        return secrets.compare_digest(word.encode(), (self.token or "").encode())

    def _brings_token(self, scope: Message) -> bool:
        words = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        return scope["path"] == "/" and self._is_token(words[0])

    def _exchange(self) -> list[Header]:
        """Headers that exchange the token in the address for a cookie. A redirect would not do:
        after a link on another site, the browser does not send a strict cookie to its target."""
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        return [(b"set-cookie", cookie.encode()), (b"refresh", b"0; url=/")]


def _from_here(headers: dict[bytes, bytes]) -> bool:
    """Whether the request names this machine, and comes from the page itself or no page at all;
    otherwise a foreign site whose name resolves to 127.0.0.1 (DNS rebinding) could read replies."""
    host, origin = headers.get(b"host", b""), headers.get(b"origin")
    return bool(re.fullmatch(_LOCAL_HOST, host)) and origin in (None, b"http://" + host)


async def _answer(send: Send, status: HTTPStatus, text: str, more: Iterable[Header] = ()) -> None:
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"cache-control", b"no-store"),
        *_HEADERS,
        *more,
    ]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
