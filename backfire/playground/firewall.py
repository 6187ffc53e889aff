"""Allow-list of the playground's server: the page and its events.

Gradio also serves uploads, files, a proxy and API descriptions. Every path that is not listed here
gets a 404.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_ALLOWED: Final = {
    "GET": r"/|/(assets|static)/.+|/theme\.css|/config/?|/favicon\.ico|/manifest\.json"
    r"|/gradio_api/(startup-events|queue/data|heartbeat/\w+|login_check/?|user/?|token/?|app_id/?)",
    "HEAD": r"/",
    "POST": r"/gradio_api/(queue/join|run/predict|reset|cancel)/?|/login/?",
}
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


class Firewall:
    """Refuses every path that is not allowed and sets headers against loading foreign content."""

    def __init__(self, app: App, *, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http" or not self._allows(scope):
            return await _refuse(scope, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        return await self.app(scope, receive, send_with_headers)

    def _allows(self, scope: Message) -> bool:
        if self.local and not _is_local(dict(scope["headers"]).get(b"host", b"")):
            return False
        return bool(re.fullmatch(_ALLOWED.get(scope["method"], "(?!)"), scope["path"]))


def _is_local(host: bytes) -> bool:
    """Whether the Host header names this machine; otherwise a foreign site whose name resolves to
    127.0.0.1 (DNS rebinding) could read the replies."""
    return bool(re.fullmatch(rb"(localhost|127\.0\.0\.1)(:\d+)?", host))


async def _refuse(scope: Message, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    headers = [(b"content-type", b"text/plain"), *_HEADERS]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    return await send({"type": "http.response.body", "body": b"Not found.\n"})
