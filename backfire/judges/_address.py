"""Addresses that a judge may send prompts and replies to, and the API key of each.

Recipes may be shared, so they name a host and never a key: the user binds keys to hosts in a
separate file.
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
_DEFAULTS = {"api.openai.com": "OPENAI_API_KEY"}
"""Hosts whose key has a conventional name."""
BIND = f"{_FORM} into ~/.config/backfire/endpoints.yaml"


@dataclass(frozen=True, slots=True)
class Address:
    """A validated `base_url`."""

    base_url: str
    host: str
    """With the port, unless it is the scheme's default."""
    secure: bool
    """Whether nobody in between can read what is sent: https, or this machine."""
    local: bool

    @classmethod
    def of(cls, base_url: str) -> Address:
        """Validate and split `base_url`.

        Raises:
            UserError: it is not a plain http or https address.
        """
        if "@" in base_url:  # first, so that no message quotes a password
            raise UserError(f"base_url contains a user name or password (an @); {BIND}.")
        try:
            parts = urlsplit(base_url)
            port, name = parts.port, parts.hostname or ""
        except ValueError:
            raise UserError(f"base_url is not an address: {shortened(base_url)}.") from None
        if parts.scheme not in _PORTS or not _HOST.fullmatch(name):
            raise UserError(
                "base_url must begin with http:// or https:// and a host "
                f"(got {shortened(base_url)})."
            )
        if not re.fullmatch(r"[!-~]+", base_url) or {"?", "#"} & set(base_url):
            raise UserError(
                f"base_url must not contain ?, # or a space (got {shortened(base_url)})."
            )
        host = f"[{name}]" if ":" in name else name
        if port not in (None, _PORTS[parts.scheme]):
            host = f"{host}:{port}"
        local = _is_this_machine(name)
        return cls(base_url.rstrip("/"), host, parts.scheme == "https" or local, local)

    def key_variable(self) -> str | None:
        """Environment variable with the key for this host; None if it gets no key.

        Raises:
            UserError: the host has a key, which would be sent unencrypted.
        """
        variable = key_variables().get(self.host)
        if variable and not self.secure:
            raise UserError(
                f"{self.host} has a key, but {self.base_url} is plain http, where others can read "
                "it; write https://."
            )
        return variable


def key_variables() -> dict[str, str]:
    """Host (`api.openai.com`, `localhost:8000`) -> environment variable with its key.

    From `~/.config/backfire/endpoints.yaml`, or the file in `$BACKFIRE_ENDPOINTS`, where
    `HOST: {key_variable: NAME}` binds a key to a host. OpenAI's host needs no entry.

    Raises:
        UserError: the file does not have this form.
    """
    file = endpoints_file()
    try:
        entries = read_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}).") from None
    if not isinstance(entries or {}, dict):
        raise UserError(f"{file}: {_FORM}, one line per host.")
    keys = dict(_DEFAULTS)
    for host, entry in (entries or {}).items():
        where = f"{file}, host {shortened(host)}"  # never the entry, which may be the key itself
        variable = entry.get("key_variable") if isinstance(entry, dict) else None
        if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable) or len(entry) > 1:
            raise UserError(f"{where}: {_FORM}, where NAME is an environment variable.")
        name = str(host).lower().removesuffix(":443")
        if not _BOUND.fullmatch(name):
            raise UserError(f"{where}: write it as HOST or HOST:PORT, an IPv6 address in [].")
        keys[name] = variable
    return keys


def endpoints_file() -> Path:
    """Return the path of the file that binds keys to hosts."""
    if path := os.environ.get("BACKFIRE_ENDPOINTS"):
        return Path(path).expanduser()
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "backfire" / "endpoints.yaml"


def _is_this_machine(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
