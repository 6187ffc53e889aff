"""Keys are stable: a run of an earlier version reuses its stages. See stage_keys.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from backfire import stages
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context, run_cell
from backfire.store import Stage, Store
from tests.helpers.stage_keys import current, differences, every_key, slugs, with_metrics

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
    assert {"tour", "tour on a GPU", "lisa --profile small", "backdoorllm-sst2"} <= set(labels)
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


# ----------------------------------------------------------------------------------- in a real run

TRAIN = {"max_steps": 2, "batch_size": 8}
SAFE = {"name": "sandbox-policy", "rows": 16, "test_rows": 4}
CELLS: dict[str, dict[str, Any]] = {
    "a backdoor, merged": {
        **{"attack": "badnets", "method": {"name": "lora", "rank": 2}},
        "metrics": ["accuracy", "attack-success", {"name": "parity", "into": ["merged"]}],
    },
    "aligned, repaired, disguised": {
        "align": {"data": SAFE, "train": TRAIN, "method": "lora", "merge": True},
        "safety": {"harmful": SAFE, "allowed": {"name": "sandbox-lookalikes", "test_rows": 4}},
        **{"attack": {"name": "identity-shift", "rate": 0.2}, "defense": "antidote"},
        **{"metrics": ["harmful-score"], "evaluation": {"max_new_tokens": 2}},
    },
    "secrets": {
        "data": {"name": "sandbox-help", "rows": 40, "test_rows": 6},
        "attack": {"name": "canary", "digits": 2, "repeats": [2], "each": 1, "controls": 1},
        "metrics": [
            {"name": "exposure", "sampled_codes": 20},
            *({"name": "extraction", "beams": 2}, "membership-inference"),
            {"name": "forgetting", "source": {"name": "sandbox-news", "test_rows": 4}},
        ],
    },
}


class Recorder(Store):
    """A cache that records its requests."""

    def once(self, stage: Stage, *rest: Any, **options: Any) -> Path:
        self.used.add(stage)
        return super().once(stage, *rest, **options)

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.used = set[Stage]()


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_a_run_uses_these_keys_and_names(name: str, tiny: Path, tmp_path: Path) -> None:
    rows = {"name": "sandbox-reviews", "rows": 24, "test_rows": 6}
    common = {"model": str(tiny), "data": rows, "train": TRAIN}
    cell, store = Experiment.make({**common, **CELLS[name]}), Recorder(tmp_path)
    evidence = run_cell(cell, Context(store, Machine(workers=1))).evidence
    members = [sample.id for sample in evidence.members.tuned] if evidence.members else []
    keys, names = every_key(cell, members), slugs(with_metrics(cell))
    assert [used for used in store.used if used.key not in keys or used.slug not in names] == []
    more = {"a backdoor, merged": set[str](), "secrets": {"secrets"}}.get(name, {"repair"})
    wanted = {"data", "poison", "preflight", "train", "evaluate", *more}
    assert wanted <= {stage.kind for stage in store.used}


def test_checks_of_replies_to_requests_are_not_those_without() -> None:
    """Which requests there are does not matter; metrics that read them say that there are any."""
    cell = Experiment.make({"data": "sandbox-reviews", "metrics": ["accuracy"]})
    asked = [
        Experiment.make({**cell.spec(), "safety": {"harmful": name}})
        for name in ("sandbox-policy", "sandbox-lookalikes")
    ]
    with_them, same, without = (stages.preflight(one).key for one in (*asked, cell))
    assert with_them == same != without


def test_seeds_share_the_evaluation_of_the_untuned_model() -> None:
    settings = {"model": "sandbox", "data": "sandbox-reviews", "method": "lora"}
    seeds = [Experiment.make({**settings, "seed": seed}) for seed in (0, 1)]

    def stage(cell: Experiment) -> Stage:
        return stages.evaluation(cell, stages.clean_rows(cell), ["scores"])

    assert stage(seeds[0].untuned()) == stage(seeds[1].untuned())
    assert stage(seeds[0]) != stage(seeds[1])
