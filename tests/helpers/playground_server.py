"""A playground in a separate process: `python playground_server.py RUN {plain,hostile,shared}`.

Gradio leaves event loops and sockets open and sets off warnings that pytest takes for errors. Says
on one line of JSON where it is; ends when its input does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

HOSTILE = (
    "<img src=x onerror=document.title='pwned'>",
    "<script>document.title='pwned'</script>",
    "![x](http://127.0.0.1:9/pixel.png)",
    "[click](javascript:document.title='pwned') **bold** $x$ `code`",
    "</textarea></script><svg onload=document.title='pwned'>",
)
EVERY = "\n".join(HOSTILE)


def seal() -> None:
    """Whoever reaches for another machine ends the process."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def here(host: object) -> None:
        if host not in (None, "", "127.0.0.1", "::1", "localhost", b"localhost"):
            print(f"tried to reach {host}", flush=True)
            os._exit(3)

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            here(address[0])
        connect(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        here(host)
        return lookup(host, *args, **kwargs)

    socket.socket.connect = guarded_connect  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = guarded_lookup


def plain(run: Path) -> dict[str, Any]:
    from backfire.playground import server

    blocked = _instead_of_waiting()
    server.serve(run, "cpu", port=None, share=False)
    [page] = blocked
    sockets = [one.getsockname()[0] for part in page.server.servers for one in part.sockets]
    return {"url": page.local_url, "bound": sockets, "shared": page.share_url}


def _instead_of_waiting() -> list[Any]:
    """Pages that `serve` opens, once it has returned without waiting for their end."""
    import gradio

    blocked: list[Any] = []
    gradio.Blocks.block_thread = lambda self: blocked.append(self)
    return blocked


def hostile(run: Path) -> dict[str, Any]:
    """All that a model says is an attack on the page."""
    from backfire.playground.models import ChatModel

    def reply(self: ChatModel, row: Any) -> Any:
        yield EVERY[:9]
        time.sleep(0.2)
        yield EVERY

    ChatModel.reply = reply  # type: ignore[method-assign]
    ChatModel.likelihood = lambda self, row, answer: [(bad, -1.0) for bad in HOSTILE]  # type: ignore
    ChatModel.labels = lambda self, row: dict.fromkeys(HOSTILE, -1.0)  # type: ignore[method-assign]
    return plain(run)


def shared(run: Path) -> dict[str, Any]:
    """What `--share` asks gradio for, without the relay; and what a taken port says."""
    import gradio

    from backfire.errors import UserError
    from backfire.playground import server
    from backfire.playground.pool import ModelPool

    asked: list[dict[str, Any]] = []
    launch = gradio.Blocks.launch

    def guarded(self: Any, **options: Any) -> Any:
        asked.append(options)
        done = launch(self, **{**options, "share": False})
        self.share_url = "https://x.gradio.live"
        return done

    gradio.Blocks.launch = guarded
    blocked = _instead_of_waiting()
    server.serve(run, "cpu", port=None, share=True)
    [page] = blocked
    try:
        server.open_page(ModelPool(run, "cpu"), "x", port=page.server_port, share=False)
    except UserError as error:
        taken = str(error)
    first, second = asked
    return {
        "url": page.local_url,
        "taken": taken,
        "auth": [first["auth"], second["auth"]],
        "share": [first["share"], second["share"]],
        "names": [first["server_name"], second["server_name"]],
    }


if __name__ == "__main__":
    seal()
    print(
        json.dumps(
            {"plain": plain, "hostile": hostile, "shared": shared}[sys.argv[2]](Path(sys.argv[1]))
        )
    )
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)
