"""The test suite where no other machine can be reached."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.helpers.places import ROOT
from tests.torture import mounts
from tests.torture.cell import Say
from tests.torture.child import Child
from tests.torture.row import Figures, Ground, NotHere, row

FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


@row(
    "The test suite runs with HF_HUB_OFFLINE=1 in a network of its own, from which no other "
    "machine can be reached; the kernel counts every try, those of child processes too. (The "
    "count is the per cent of the test files.)",
    full=100,
    small=0,  # in every test run, tests/conftest.py refuses and counts connections
    zero=("tries", "failed_tests"),
    some=("passed_tests", "tries_that_are_made_on_purpose"),
)
def suite_without_network(count: int, ground: Ground) -> Figures:
    files = [file for n, file in enumerate(FILES) if n * count // 100 != (n - 1) * count // 100]
    found = Child(_without_network, ground.root, files).result(seconds=7200)
    if isinstance(found, str):
        raise NotHere(found)
    return found  # type: ignore[no-any-return]


def _without_network(say: Say, folder: Path, files: list[str]) -> dict[str, int] | str:
    try:
        mounts.alone_without_network()
        resolver = folder / "resolv.conf"
        resolver.write_text("nameserver 192.0.2.53\n")  # no machine has this address
        mounts.show(resolver, Path("/etc/resolv.conf"))
    except NotHere as lacking:
        return str(lacking)
    before = mounts.tries()
    for attempt in (_connects, _looks_up):
        attempt()
    on_purpose = mounts.tries() - before
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *files]
    command += ["-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    print(*(line for line in done.stdout.splitlines() if line.startswith("FAILED")), sep="\n")
    return {
        "passed_tests": counts.get("passed", 0),
        "failed_tests": counts.get("failed", 0) + counts.get("error", 0),
        "tries": mounts.tries() - before - on_purpose,
        "tries_that_are_made_on_purpose": on_purpose,
    }


def _connects() -> None:
    with suppress(OSError):
        socket.create_connection(("192.0.2.1", 80), timeout=1).close()


def _looks_up() -> None:
    with suppress(OSError):
        socket.getaddrinfo("huggingface.co", 443)
