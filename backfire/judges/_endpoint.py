"""A language model behind an OpenAI-compatible address: `POST <base_url>/chat/completions`.

Standard library only. Keys are bound to hosts outside of recipes (see `judges._address`). A key is
read when a request is sent and never stored; redirects are refused, since they would send it to
another host.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from pydantic import Field

from backfire.base import Judge
from backfire.errors import CellError
from backfire.judges._address import BIND, Address, Key

FIRST_WAIT_SECONDS = 1.0
"""Wait before the second try; doubled before each further one."""
LONGEST_WAIT_SECONDS = 60.0
"""Longest wait, whatever the server requests."""
_LARGEST_BYTES = 2**24
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that are worth a retry."""


class _TransientError(Exception):
    """A failure that is worth a retry."""

    def __init__(self, message: str, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


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

    def ask(self, prompt: str) -> str:
        """Return the model's answer, greedily decoded; it may be empty.

        Raises:
            CellError: every try failed, or the server rejected the request.
        """
        for tries in range(self.retries + 1):
            try:
                return self._once(prompt)
            except _TransientError as failure:
                if tries == self.retries:
                    raise CellError(
                        "failed", f"{self.url} failed {tries + 1} times, last: {failure}."
                    ) from None
                wait = max(FIRST_WAIT_SECONDS * 2**tries, failure.wait_seconds)
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
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
        raise _TransientError("the answer is not a chat completion") from None
    if not isinstance(content, str | None):
        raise _TransientError("the answer is not text")
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
        """Return the answers, in order; the first failure cancels the other requests."""
        address = Address.of(base_url)
        endpoint = Endpoint(
            address=address,
            model=model,
            key=address.key(),
            max_new_tokens=max_new_tokens,
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
        )
        pool = ThreadPoolExecutor(max_workers=max(1, min(self.concurrency, len(prompts))))
        try:
            return list(pool.map(endpoint.ask, prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
