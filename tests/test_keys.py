"""Keys stay: a run of an earlier version goes on from what it has. See stage_keys.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from stage_keys import current, differences

GOLDEN = Path(__file__).with_name("golden_keys.json")


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return current(tmp_path_factory.mktemp("keys"))


def test_every_key_of_every_recipe_is_as_it_was(golden: Any, now: Any) -> None:
    found = differences(golden, now)
    assert not found, "\n".join([f"{len(found)} differences:", *found[:20]])


def test_every_recipe_and_profile_is_in_it(golden: Any) -> None:
    labels = golden["recipes"]
    assert {"tour", "tour on a GPU", "lisa --profile real", "backdoorllm-sst2"} <= set(labels)
    assert sum(len(one["cells"]) for one in labels.values()) > 800
    layouts = set(" | ".join(golden["layouts"].values()).split(" | "))
    assert {
        *("twin.train", "alignment.tuned", "untuned.clean", "cell.merge", "cell.preflight"),
        *("triggered twin", "measured", "clean cell merged-nf4", "harmful untuned", "allowed cell"),
        *("secrets exact cell", "secrets sampled untuned", "members start", "texts start", "slugs"),
    } <= layouts


def test_another_machine_has_other_keys(golden: Any) -> None:
    """Which is why the test pins it."""
    cpu, gpu = (golden["recipes"][label]["cells"] for label in ("tour", "tour on a GPU"))
    assert all(one.split()[2] != other.split()[2] for one, other in zip(cpu, gpu, strict=True))


def test_a_difference_names_recipe_cell_and_stage(golden: Any) -> None:
    other = copy.deepcopy(golden)
    line = other["recipes"]["tour"]["cells"][-1].split(" ")
    stages = golden["layouts"][line[1]].split(" | ")
    place = 2 + stages.index("twin.train")
    other["recipes"]["tour"]["cells"][-1] = " ".join([*line[:place], "0000", *line[place + 1 :]])
    assert differences(golden, other) == [f"tour: cell 19 {line[0]}: twin.train"]
    assert differences(golden, golden) == []
