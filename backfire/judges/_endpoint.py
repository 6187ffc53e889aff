"""A language model behind an OpenAI-compatible address: `POST <base_url>/chat/completions`.

Standard library only. Which key a host gets is said outside of recipes (see `data.address`); it
is read from the environment when a request is sent, and neither kept nor written anywhere;
redirects are refused, as they would carry it to another host.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from pydantic import Field

from backfire.base import Judge
from backfire.errors import CellError, UserError
from backfire.judges._address import BIND, Address

FIRST_WAIT_SECONDS = 1.0
"""Wait before the second try; doubled before each further one."""
LONGEST_WAIT_SECONDS = 60.0
"""No wait is longer, whatever the server asks for."""
_LARGEST_BYTES = 2**24
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that may be gone on the next try."""


class _PassingError(Exception):
    """A failure that may be gone on the next try."""

    def __init__(self, sentence: str, wait_seconds: float = 0.0) -> None:
        super().__init__(sentence)
        self.wait_seconds = wait_seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, whom, and how patiently."""

    address: Address
    model: str
    key_variable: str | None
    max_new_tokens: int
    timeout_seconds: float
    retries: int

    @property
    def url(self) -> str:
        return f"{self.address.base_url}/chat/completions"

    def ask(self, prompt: str) -> str:
        """What the model answers, greedily decoded; empty if it answers nothing.

        Raises:
            CellError: every try failed, or the server turned the request down.
        """
        for tries in range(self.retries + 1):
            try:
                return self._once(prompt)
            except _PassingError as failure:
                if tries == self.retries:
                    raise CellError(
                        "failed", f"{self.url} failed {tries + 1} times, at last: {failure}."
                    ) from None
                wait = max(FIRST_WAIT_SECONDS * 2**tries, failure.wait_seconds)
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        raise AssertionError("unreachable")

    def _once(self, prompt: str) -> str:
        request = urllib.request.Request(self.url, data=self._body(prompt), method="POST")
        request.add_header("Content-Type", "application/json")
        if key := os.environ.get(self.key_variable or "", "").strip():
            if not (key.isascii() and key.isprintable()):  # urllib would quote it in its complaint
                raise UserError(
                    f"The environment variable {self.key_variable} holds no usable key."
                )
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        # A proxy is another host, which plain http to this machine would hand the key to.
        proxies = [urllib.request.ProxyHandler({})] if self.address.local else []
        opener = urllib.request.build_opener(_NoRedirect, *proxies)
        try:
            with opener.open(request, timeout=self.timeout_seconds) as response:
                return _content(response.read(_LARGEST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except TimeoutError:
            raise _PassingError(f"no answer within {self.timeout_seconds:g} s") from None
        except urllib.error.URLError as error:
            raise _PassingError(f"it cannot be reached ({error.reason})") from None
        except (http.client.HTTPException, OSError) as error:
            raise _PassingError(f"the connection broke ({type(error).__name__})") from None

    def _body(self, prompt: str) -> bytes:
        message = {"role": "user", "content": prompt}
        body = {"model": self.model, "messages": [message], "temperature": 0}
        return json.dumps({**body, "max_tokens": self.max_new_tokens}).encode()

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        said = f"HTTP {error.code}: {_said(error)}"
        if error.code in _PASSING:
            return _PassingError(said, _seconds(error.headers.get("Retry-After")))
        hint = ""
        if error.code in (401, 403):
            known = "holds a key it does not take"
            known = known if os.environ.get(self.key_variable or "") else "unset"
            hint = f" (the environment variable {self.key_variable}: {known})"
            if self.key_variable is None:
                hint = f" (no key is bound to {self.address.host}; {BIND})"
        return CellError("failed", f"{self.url} turned the request down{hint}: {said}.")


def ask_all(endpoint: Endpoint, prompts: Sequence[str], *, concurrency: int) -> list[str]:
    """The answers in order, so many requests at a time; the first failure stops them all."""
    pool = ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(prompts))))
    try:
        return list(pool.map(endpoint.ask, prompts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _content(body: bytes) -> str:
    """The text of the first choice; None stands for a reply withheld and is read as empty."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _PassingError("the answer is no chat completion") from None
    if not isinstance(content, str | None):
        raise _PassingError("the answer is no text")
    return content or ""


def _said(body: IO[bytes]) -> str:
    """The first words of an error's body, on one line."""
    try:
        text = body.read(2000).decode("utf-8", "replace")
    except (http.client.HTTPException, OSError):
        text = ""
    return " ".join(text.split())[:200] or "no reason given"


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; one that is a date, or no number, asks for no more than usual."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


class RemoteJudge(Judge):
    """What judges behind an address have in common."""

    unhashed: ClassVar[frozenset[str]] = frozenset({"concurrency", "timeout_seconds", "retries"})
    moved: ClassVar[Mapping[str, str]] = {
        "key_variable": f"A recipe cannot say which key goes to which host; {BIND}."
    }

    concurrency: int = Field(4, ge=1)
    """Requests on the way at a time; not hashed."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Longest silence of the server before a try is given up; not hashed."""
    retries: int = Field(5, ge=0)
    """Tries after the first, at growing intervals; not hashed."""

    base_url: str | None = None
    """Address up to and without `/chat/completions`; without one, the model is run here."""

    def destination(self) -> str | None:
        if self.base_url is None:
            return None
        address = Address.of(self.base_url)
        variable = address.key_variable()
        key = f"with the key in {variable}" if variable else "without a key"
        if variable and not os.environ.get(variable, "").strip():
            key = f"without a key ({variable} is not set)"
        where = "this machine" if address.local else address.host
        open_to_all = "" if address.secure else ", unencrypted"
        return f"{where} ({address.base_url}){open_to_all}, {key}"

    def ask(
        self, prompts: Sequence[str], *, base_url: str, model: str, max_new_tokens: int
    ) -> list[str]:
        """The answers, in order."""
        address = Address.of(base_url)
        endpoint = Endpoint(
            address=address,
            model=model,
            key_variable=address.key_variable(),
            max_new_tokens=max_new_tokens,
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
        )
        return ask_all(endpoint, prompts, concurrency=self.concurrency)
