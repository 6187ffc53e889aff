"""Addresses that a judge may send prompts and replies to, and the API key of each.

Recipes may be shared, so they name a host and never a key: the user binds keys to hosts in a
separate file, which only the user can write.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from backfire.errors import UserError, shortened
from backfire.yaml12 import read_yaml

_PORTS = {"http": 80, "https": 443}
_NAME = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*"
_HOST = re.compile(_NAME + r"|[0-9a-f:.]+:[0-9a-f:.]+")
_BOUND = re.compile(rf"({_NAME}|\[[0-9a-f:.]+\])(:[0-9]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORM = "write HOST: {key_variable: NAME} or HOST: {key_file: PATH}"
BIND = f"{_FORM} into ~/.config/backfire/endpoints.yaml"


@dataclass(frozen=True, slots=True)
class Key:
    """Where the key of a host is found; its content is read when it is sent."""

    variable: str | None = None
    file: Path | None = None

    def __str__(self) -> str:
        return str(self.variable or self.file)

    @property
    def missing(self) -> str:
        """What to say if there is no key."""
        return f"{self} is not set" if self.variable else f"{self} does not exist or is empty"

    def read(self) -> str | None:
        """The key, if there is one.

        Raises:
            UserError: other users can read the file, or what it holds cannot be a key.
        """
        if self.variable:
            key = os.environ.get(self.variable, "").strip()
        elif self.file and self.file.exists():
            _check_others(self.file, secret=True)
            key = _text_of(self.file).strip()
        else:
            return None
        if not (key.isascii() and key.isprintable()):  # urllib's error would quote it
            raise UserError(f"{self} does not contain a usable key.")
        return key or None


_DEFAULTS = {"api.openai.com": Key("OPENAI_API_KEY")}
"""Hosts whose key has a conventional name."""


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

    def key(self) -> Key | None:
        """Where the key for this host is; None if it gets no key.

        Raises:
            UserError: the host has a key, which would be sent unencrypted.
        """
        key = keys().get(self.host)
        if key and not self.secure:
            raise UserError(
                f"{self.host} has a key, but {self.base_url} is plain http, where others can read "
                "it; write https://."
            )
        return key


def keys() -> dict[str, Key]:
    """Host (`api.openai.com`, `localhost:8000`) -> where its key is.

    From `~/.config/backfire/endpoints.yaml`, or the file in `$BACKFIRE_ENDPOINTS`, where
    `HOST: {key_variable: NAME}` or `HOST: {key_file: PATH}` binds a key to a host. OpenAI's host
    needs no entry.

    Raises:
        UserError: the file does not have this form, or other users can write to it.
    """
    file = endpoints_file()
    if not file.is_file():
        return dict(_DEFAULTS)
    # Whoever can write here chooses who gets the keys.
    _check_others(file)
    entries = read_yaml(_text_of(file), str(file)) or {}
    if not isinstance(entries, dict):
        raise UserError(f"{file}: {_FORM}, one line per host.")
    return _DEFAULTS | dict(_entry(file, host, entry) for host, entry in entries.items())


def _entry(file: Path, host: object, entry: object) -> tuple[str, Key]:
    """Host and key of one line of the file."""
    where = f"{file}, host {shortened(host)}"  # never the entry, which may be the key itself
    [(kind, value)] = entry.items() if isinstance(entry, dict) and len(entry) == 1 else [("", "")]
    if not isinstance(value, str) or not value:
        kind = ""
    if kind == "key_variable" and _VARIABLE.fullmatch(value):
        key = Key(variable=value)
    elif kind == "key_file":
        key = Key(file=file.parent / Path(value).expanduser())
    else:
        raise UserError(f"{where}: {_FORM}, where NAME is an environment variable.")
    name = str(host).lower().removesuffix(":443")
    if not _BOUND.fullmatch(name):
        raise UserError(f"{where}: write it as HOST or HOST:PORT, an IPv6 address in [].")
    return name, key


def _check_others(file: Path, *, secret: bool = False) -> None:
    """Refuse a file that other users own or can replace or write to; if it is secret, also one of
    this user that they can read (an administrator's is as it has to be, as in Kubernetes)."""
    for place in (file := file.resolve(), file.parent):
        about = place.stat()
        if about.st_uid not in (0, os.geteuid()):
            raise UserError(f"{place} belongs to another user, who could take your keys.")
        # In a folder such as /tmp (sticky), others cannot replace a file.
        if about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX:
            raise UserError(
                f"Other users can write to {place}; run: chmod go-w {quote(str(place))}"
            )
    if secret and file.stat().st_mode & 0o044 and file.stat().st_uid == os.geteuid():
        raise UserError(f"Other users can read {file}; run: chmod go= {quote(str(file))}")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}).") from None


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
