"""The door of the playground's server, without gradio."""

from __future__ import annotations

import asyncio
from typing import Any

from backfire.playground.firewall import Firewall


def get(door: Firewall, query: str = "", cookie: str = "") -> tuple[int, dict[str, str]]:
    """Status and headers of the page."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:7860"), (b"cookie", cookie.encode())]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(door({**scope, "query_string": query.encode()}, None, send))  # type: ignore[arg-type]
    named = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], named


async def page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_two_playgrounds_of_a_host_do_not_log_each_other_out() -> None:
    """A browser keeps one cookie of a name for all ports of a host."""
    doors = [Firewall(page, token=token) for token in ("first", "second")]
    jar = dict(
        get(door, f"token={door.token}")[1]["set-cookie"].split(";")[0].split("=") for door in doors
    )
    assert len(jar) == 2
    cookie = "; ".join(f"{name}={value}" for name, value in jar.items())
    assert [get(door, cookie=cookie)[0] for door in doors] == [200, 200]
    assert [get(door, cookie=cookie.replace(door.token or "", "x"))[0] for door in doors] == [
        401
    ] * 2
