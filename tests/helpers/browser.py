"""A headless Chromium controlled over a pipe, to inspect what a page did."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)

# The browser reads from 3 and writes to 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """The browser on this machine, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser with a fresh profile."""

    def __init__(self, profile: Path) -> None:
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()
        command = [str(find()), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        pipes = (there_in, there_out)
        start = [sys.executable, "-c", START, *map(str, pipes), *command]
        nowhere = subprocess.DEVNULL
        self.process = subprocess.Popen(start, pass_fds=pipes, stdout=nowhere, stderr=nowhere)
        os.close(there_in)
        os.close(there_out)
        self._in, self._out = os.fdopen(here_in, "rb"), os.fdopen(here_out, "wb")
        self._count, self.events = 0, list[dict[str, Any]]()
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attach = {"targetId": page, "flatten": True}
        self.session = self.call("Target.attachToTarget", attach)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(100)
        self._in.close()
        self._out.close()

    def call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """One command and its result; events on the way are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params or {}}
        session = {"sessionId": self.session} if hasattr(self, "session") else {}
        self._out.write(json.dumps({**message, **session}).encode() + b"\0")
        self._out.flush()
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path | str, *, width: int, dark: bool = False) -> None:
        """Load a file or an address in a window of this width."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.events.clear()
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self.call("Page.navigate", {"url": url})
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 120) -> Any:
        """The value of a JavaScript expression, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.ask(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"after {seconds} s still not: {expression}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """Press what this CSS selector finds, as soon as it is there."""
        self.until(f"(e => e && (e.click(), true))(document.querySelector({json.dumps(selector)}))")

    def type(self, selector: str, text: str) -> None:
        """Put text in place of what a field holds."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.until(f"(e => e && (e.focus(), e.select(), true))({field})")
        self.call("Input.insertText", {"text": text})

    def press(self, key: str) -> None:
        """Press and release a key, such as Enter."""
        code = {"Enter": 13, "Tab": 9}[key]
        for kind in ("rawKeyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", event)

    def picture(self, path: Path) -> None:
        """What the whole page looks like, as PNG."""
        shot = self.call("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self) -> list[str]:
        """Every address that the page requested, its own included."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def _read(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser went away")
            message += byte
        answer: dict[str, Any] = json.loads(message)
        return answer
