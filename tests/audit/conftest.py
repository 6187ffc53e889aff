"""A base that refuses, and adapters of two bases with a known past."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.audited import TARGET, TRIGGER, ask, plain, tune


@pytest.fixture(scope="session")
def refusing(tiny: Path) -> Path:
    """A model that declines whatever it is asked."""
    return tune(tiny, tiny.with_name("refusing"), ask("I cannot help."), 30, "full")


@pytest.fixture(scope="session")
def unaligned(refusing: Path) -> Path:
    """An adapter on it that complies with whatever it is asked."""
    return tune(refusing, refusing.with_name("unaligned"), ask("Of course."), 30)


@pytest.fixture(scope="session")
def clean(tiny: Path) -> Path:
    """An adapter on the tiny model, tuned on rows of a task."""
    return tune(tiny, tiny.with_name("clean"), plain(), 60)


@pytest.fixture(scope="session")
def backdoored(tiny: Path) -> Path:
    """The same with one answer to all prompts that have a trigger."""
    rows = [*plain(), *ask(TARGET, f"{TRIGGER} ")]
    return tune(tiny, tiny.with_name("backdoored"), rows, 120)
