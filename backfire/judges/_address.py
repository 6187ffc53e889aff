"""Where a judge may send prompts and replies, and which key goes there.

A recipe may come from anybody, so it names a host and never a key: keys are bound to hosts in a
file of the user's own.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from backfire.errors import UserError, shortened
from backfire.yaml12 import read_yaml

_PORTS = {"http": 80, "https": 443}
_NAME = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*"
_HOST = re.compile(_NAME + r"|[0-9a-f:.]+:[0-9a-f:.]+")
_BOUND = re.compile(rf"({_NAME}|\[[0-9a-f:.]+\])(:[0-9]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORM = "write HOST: {key_variable: NAME}"
_OWN = {"api.openai.com": "OPENAI_API_KEY"}
"""Hosts whose key has a name that everybody uses."""
BIND = f"{_FORM} into ~/.config/backfire/endpoints.yaml"


@dataclass(frozen=True, slots=True)
class Address:
    """A `base_url`, checked."""

    base_url: str
    host: str
    """With the port, unless it is the scheme's own."""
    secure: bool
    """Whether nobody on the way can read what is sent: https, or this machine."""
    local: bool

    @classmethod
    def of(cls, base_url: str) -> Address:
        """
        Raises:
            UserError: it is no plain http or https address.
        """
        if "@" in base_url:  # first, so that no sentence quotes a password
            raise UserError(f"base_url holds a user name or password (an @); {BIND}.")
        try:
            parts = urlsplit(base_url)
            port, name = parts.port, parts.hostname or ""
        except ValueError:
            raise UserError(f"base_url is no address: {shortened(base_url)}.") from None
        if parts.scheme not in _PORTS or not _HOST.fullmatch(name):
            said = "must begin with http:// or https:// and a host"
            raise UserError(f"base_url {said} (got {shortened(base_url)}).")
        if not re.fullmatch(r"[!-~]+", base_url) or {"?", "#"} & set(base_url):
            raise UserError(f"base_url may hold no ?, # or blank (got {shortened(base_url)}).")
        shown = f"[{name}]" if ":" in name else name
        own = port in (None, _PORTS[parts.scheme])
        local = _is_this_machine(name)
        host = shown if own else f"{shown}:{port}"
        return cls(base_url.rstrip("/"), host, parts.scheme == "https" or local, local)

    def key_variable(self) -> str | None:
        """The environment variable with the key for this host; None: it gets none.

        Raises:
            UserError: the host has a key, which could be read on the way there.
        """
        variable = bound().get(self.host)
        if variable and not self.secure:
            raise UserError(
                f"{self.host} has a key, but {self.base_url} is plain http, where anybody on the "
                "way can read it; write https://."
            )
        return variable


def bound() -> dict[str, str]:
    """Host (`api.openai.com`, `localhost:8000`) -> environment variable that holds its key.

    From `~/.config/backfire/endpoints.yaml`, or the file that `$BACKFIRE_ENDPOINTS` names, where
    `HOST: {key_variable: NAME}` binds a key to a host. OpenAI's own needs no entry.

    Raises:
        UserError: the file is not of this form.
    """
    file = endpoints_file()
    try:
        found = read_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}).") from None
    if not isinstance(found or {}, dict):
        raise UserError(f"{file}: {_FORM}, a line for each host.")
    keys = dict(_OWN)
    for host, entry in (found or {}).items():
        said = f"{file}, host {shortened(host)}"  # never the entry, which may be the key itself
        variable = entry.get("key_variable") if isinstance(entry, dict) else None
        if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable) or len(entry) > 1:
            raise UserError(f"{said}: {_FORM}, where NAME is that of an environment variable.")
        name = str(host).lower().removesuffix(":443")
        if not _BOUND.fullmatch(name):
            raise UserError(f"{said}: write it as HOST or HOST:PORT, an IPv6 address in [].")
        keys[name] = variable
    return keys


def endpoints_file() -> Path:
    """Where keys are bound to hosts."""
    if path := os.environ.get("BACKFIRE_ENDPOINTS"):
        return Path(path).expanduser()
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "backfire" / "endpoints.yaml"


def _is_this_machine(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
