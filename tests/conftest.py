"""Fixtures of all tests: no network, one thread, a separate cache, and a tiny model."""

from __future__ import annotations

import io
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.chat_templates import CHAT_TEMPLATE, CONTROLS
from tests.helpers.command_line import Output
from tests.helpers.tiny import write_tiny_model, write_tiny_tokenizer

# Read once, when the libraries are first imported, and by every subprocess.
os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200"
)

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, and no clock: a slow machine is not a failure.
settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


SLOW = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.slow", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without the slow tests, files that are slow as a whole are not even imported."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return SLOW.search(collection_path.read_text("utf-8")) is not None or None


@pytest.fixture(scope="session", autouse=True)
def _sealed_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Sockets reach this machine only; the user's cache is out of sight; one core, one thread."""
    attempts: list[str] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def allowed(host: object) -> bool:
        return host in (None, "", "127.0.0.1", "::1", "localhost", b"localhost")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not allowed(address[0]):
            attempts.append(str(address))
            raise RuntimeError(f"a test tried to reach {address}")
        connect(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not allowed(host):
            attempts.append(str(host))
            raise RuntimeError(f"a test tried to look up {host}")
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test outlives a power cut
        patch.setenv("BACKFIRE_ENDPOINTS", str(tmp_path_factory.mktemp("config") / "none.yaml"))
        patch.setenv("BACKFIRE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield attempts


@pytest.fixture(autouse=True)
def _from_the_same_start(_sealed_off: list[str]) -> Iterator[None]:
    """Seed the global generators; after the test, fail if the network was used."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
    before = len(_sealed_off)
    yield
    # Code that catches every error would hide the refusal, so it is looked for here.
    assert _sealed_off[before:] == []


# ----------------------------------------------------------------------------------- tiny model


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 400 tokens, trained on some of the sandbox's text."""
    return write_tiny_tokenizer(tmp_path_factory.mktemp("models") / "tokenizer")


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer: Path) -> Path:
    """A model folder: a two-layer Llama with random weights, and the tokenizer."""
    return write_tiny_model(tiny_tokenizer, tiny_tokenizer.with_name("tiny"))


@pytest.fixture
def model(tiny: Path) -> Any:
    """The tiny model, fresh from its folder."""
    import torch

    from backfire.model.load import load_base

    return load_base(tiny, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer: Path) -> Any:
    """The tiny tokenizer as the renderer knows it, with chat control tokens and a chat template."""
    from tokenizers import AddedToken

    from backfire.tokenizer import load_tokenizer

    plain = load_tokenizer(tiny_tokenizer)
    plain.backend.add_special_tokens([AddedToken(c, special=True) for c in CONTROLS])
    controls = (*plain.controls, *CONTROLS)
    return replace(plain, chat_template=CHAT_TEMPLATE, controls=controls)


@pytest.fixture(scope="session")
def ran(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of six cells. Tests look at it but leave it as it is."""
    from tests.helpers.small_run import MATRIX, Place

    place = Place(tmp_path_factory.mktemp("ran"), tiny)
    assert place.run(matrix=MATRIX) == 0
    return place


# --------------------------------------------------------------------------------- command line


@pytest.fixture
def backfire(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """Runs a command line in this process."""
    from backfire import cli

    def run(*arguments: object) -> Output:
        out, err, code = io.StringIO(), io.StringIO(), 0
        monkeypatch.setattr(sys, "argv", ["backfire", *map(str, arguments)])
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Output(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test alone."""
    monkeypatch.setenv("BACKFIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
