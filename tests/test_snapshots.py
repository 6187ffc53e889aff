"""Outputs are exactly those in snapshots/; an intended change shows in their diff.

`python tests/update_golden.py --snapshots` writes them again.
"""

from __future__ import annotations

import pytest

from tests.helpers.outputs import SNAPSHOTS, snapshots

NAMES = sorted(path.name for path in SNAPSHOTS.iterdir())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return snapshots(tmp_path_factory.mktemp("snapshots"))


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_as_it_was(name: str, shown: dict[str, str]) -> None:
    if name == "exports_inspect.txt":
        pytest.importorskip("inspect_ai.log")
    assert shown[name].splitlines() == (SNAPSHOTS / name).read_text("utf-8").splitlines()


def test_every_output_is_kept(shown: dict[str, str]) -> None:
    assert shown.keys() <= set(NAMES)
