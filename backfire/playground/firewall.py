"""What the playground's server lets through: the page and its events, and nothing from elsewhere.

Gradio serves more than a page needs (uploads, files, a proxy, descriptions of itself). What is not
named here is not there.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OPEN: Final = {
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


class Gate:
    """Refuses every path that is not open; tells the browser to load nothing from elsewhere."""

    def __init__(self, app: App, *, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http" or not self._lets(scope):
            return await _refuse(scope, send)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        return await self.app(scope, receive, sealed)

    def _lets(self, scope: Message) -> bool:
        if self.local and not _named_here(dict(scope["headers"]).get(b"host", b"")):
            return False
        return bool(re.fullmatch(_OPEN.get(scope["method"], "(?!)"), scope["path"]))


def _named_here(host: bytes) -> bool:
    """Whether the page was asked for by this machine's name: a site elsewhere can have its own name
    lead here, and then read what we answer."""
    return bool(re.fullmatch(rb"(localhost|127\.0\.0\.1)(:\d+)?", host))


async def _refuse(scope: Message, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    headers = [(b"content-type", b"text/plain"), *_HEADERS]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    return await send({"type": "http.response.body", "body": b"There is no such page.\n"})
