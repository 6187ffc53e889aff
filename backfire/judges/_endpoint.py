"""A language model behind an OpenAI-compatible address: `POST <base_url>/chat/completions`.

Standard library only. Keys are bound to hosts outside of recipes (see `judges._address`). A key is
read when a request is sent and never stored; redirects are refused, since they would send it to
another host.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import IO, Any, ClassVar

from pydantic import Field

from backfire.base import Judge
from backfire.errors import CellError, Unanswered
from backfire.judges._address import BIND, Address, Key
from backfire.progress import waits

FIRST_WAIT_SECONDS = 1.0
"""Wait before the second try; doubled before each further one."""
LONGEST_WAIT_SECONDS = 60.0
"""Longest wait, whatever the server requests."""
_LOOK_SECONDS = 0.2
"""Seconds between two looks whether the worker is to stop."""
_LARGEST_BYTES = 2**24
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that are worth a retry."""


class _TransientError(Exception):
    """A failure that is worth a retry; `passes`: also after a longer while, since the server is not
    there or has no time."""

    def __init__(self, message: str, wait_seconds: float = 0.0, *, passes: bool = True) -> None:
        super().__init__(message)
        self.wait_seconds, self.passes = wait_seconds, passes


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model at an address, with its key and retry settings."""

    address: Address
    model: str
    key: Key | None
    max_new_tokens: int
    timeout_seconds: float
    retries: int

    @property
    def url(self) -> str:
        return f"{self.address.base_url}/chat/completions"

    def ask(self, prompt: str, over: threading.Event) -> str:
        """Return the model's answer, greedily decoded; it may be empty.

        Args:
            over: set once nobody waits for the answer any more.

        Raises:
            CellError: every try failed (`Unanswered` if that may pass), or the server rejected the
                request.
        """
        for tries in range(self.retries + 1):
            try:
                return self._once(prompt)
            except _TransientError as failure:
                pause = max(FIRST_WAIT_SECONDS * 2**tries, failure.wait_seconds)
                if tries == self.retries or over.wait(min(pause, LONGEST_WAIT_SECONDS)):
                    sentence = f"{self.url} failed {tries + 1} times, last: {failure}."
                    error = Unanswered if failure.passes else CellError
                    raise error("failed", sentence) from None
        raise AssertionError("unreachable")

    def _once(self, prompt: str) -> str:
        request = urllib.request.Request(self.url, data=self._body(prompt), method="POST")
        request.add_header("Content-Type", "application/json")
        if key := self.key and self.key.read():
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        # A proxy is another host: plain http to this machine would send it the key.
        proxies = [urllib.request.ProxyHandler({})] if self.address.local else []
        opener = urllib.request.build_opener(_NoRedirect, *proxies)
        try:
            with opener.open(request, timeout=self.timeout_seconds) as response:
                return _content(response.read(_LARGEST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except TimeoutError:
            raise _TransientError(f"no answer within {self.timeout_seconds:g} s") from None
        except urllib.error.URLError as error:
            raise _TransientError(f"it cannot be reached ({error.reason})") from None
        except (http.client.HTTPException, OSError) as error:
            raise _TransientError(f"the connection broke ({type(error).__name__})") from None

    def _body(self, prompt: str) -> bytes:
        message = {"role": "user", "content": prompt}
        body = {"model": self.model, "messages": [message], "temperature": 0}
        return json.dumps({**body, "max_tokens": self.max_new_tokens}).encode()

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        reason = f"HTTP {error.code}: {_reason(error)}"
        if error.code in _TRANSIENT:
            return _TransientError(reason, _seconds(error.headers.get("Retry-After")))
        hint = ""
        if error.code in (401, 403):
            if self.key is None:
                hint = f" (no key is bound to {self.address.host}; {BIND})"
            elif self.key.read():
                hint = f" ({self.key} contains a key that the server does not accept)"
            else:
                hint = f" ({self.key.missing})"
        return CellError("failed", f"{self.url} rejected the request{hint}: {reason}.")


def _content(body: bytes) -> str:
    """Return the text of the first choice; None means a withheld reply and is read as empty."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _TransientError("the answer is not a chat completion", passes=False) from None
    if not isinstance(content, str | None):
        raise _TransientError("the answer is not text", passes=False)
    return content or ""


def _reason(body: IO[bytes]) -> str:
    """Return the first words of an error's body, on one line."""
    try:
        text = body.read(2000).decode("utf-8", "replace")
    except (http.client.HTTPException, OSError):
        text = ""
    return " ".join(text.split())[:200] or "no reason given"


def _seconds(header: str | None) -> float:
    """Return a Retry-After in seconds; 0 if it is a date or not a number."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


class RemoteJudge(Judge):
    """Base class of judges behind an address."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"concurrency", "timeout_seconds", "retries"})
    moved: ClassVar[Mapping[str, str]] = {
        "key_variable": f"A recipe cannot bind a key to a host; {BIND}."
    }

    concurrency: int = Field(4, ge=1)
    """Number of concurrent requests; not hashed."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Seconds without data from the server before a try fails; not hashed."""
    retries: int = Field(5, ge=0)
    """Tries after the first, at growing intervals; not hashed."""

    base_url: str | None = None
    """Address without the final `/chat/completions`; if not given, the model runs locally."""

    def destination(self) -> str | None:
        if self.base_url is None:
            return None
        address = Address.of(self.base_url)
        source = address.key()
        key = f"with the key in {source}" if source else "without a key"
        if source and not source.read():
            key = f"without a key ({source.missing})"
        where = "this machine" if address.local else address.host
        open_to_all = "" if address.secure else ", unencrypted"
        return f"{where} ({address.base_url}){open_to_all}, {key}"

    def reaches(self) -> tuple[str, bool] | None:
        if self.base_url is None:
            return None
        address = Address.of(self.base_url)
        source = address.key()
        return address.host, bool(source and source.read())

    def ask(
        self, prompts: Sequence[str], *, base_url: str, model: str, max_new_tokens: int
    ) -> list[str]:
        """Return the answers, in order; the first failure cancels the other requests.

        Raises:
            CellError: see `Endpoint.ask`.
            Stopped: the worker is to stop; see `progress.waits`.
        """
        address = Address.of(base_url)
        endpoint = Endpoint(
            address=address,
            model=model,
            key=address.key(),
            max_new_tokens=max_new_tokens,
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
        )
        return _answers(endpoint, prompts, self.concurrency)


def _answers(endpoint: Endpoint, prompts: Sequence[str], concurrency: int) -> list[str]:
    """The answers to all prompts. (The threads of an executor would have to end before the process
    does, and may wait for a server for minutes.)"""
    todo, over = SimpleQueue[tuple[Future[str], str]](), threading.Event()
    answers = [Future[str]() for _ in prompts]
    for pair in zip(answers, prompts, strict=True):
        todo.put(pair)

    def work() -> None:
        with suppress(Empty):
            while not over.is_set():
                answer, prompt = todo.get_nowait()
                try:
                    answer.set_result(endpoint.ask(prompt, over))
                except Exception as error:
                    answer.set_exception(error)

    for _ in range(min(concurrency, len(prompts))):
        threading.Thread(target=work, daemon=True).start()
    try:
        while wait(answers, _LOOK_SECONDS, FIRST_EXCEPTION).not_done:
            waits()
            if any(one.done() and one.exception() for one in answers):
                break
        return [one.result() for one in answers if one.done()]
    finally:
        over.set()
