"""Components are found by the name of the one file they are in."""

from __future__ import annotations

import subprocess
import sys
from ast import literal_eval

import pytest

from backfire.attacks.badnets import BadNets
from backfire.base import Attack
from backfire.errors import UserError, unknown
from backfire.registry import KINDS, build, find, names, register


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_sorted_and_found(kind: str) -> None:
    assert names(kind) == sorted(names(kind)) != []
    for name in names(kind):
        assert "_" not in name
        assert find(kind, name).name == name
        assert find(kind, name.replace("-", "_")) is find(kind, name)


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("attacks", "badnet", "Unknown attack 'badnet'; did you mean 'badnets'?"),
        ("methods", "lorra", "Unknown method 'lorra'; did you mean 'lora'?"),
        ("templates", "alpacca", "Unknown template 'alpacca'; did you mean 'alpaca'?"),
        (
            "datasets",
            "sandbox-review",
            "Unknown dataset 'sandbox-review'; did you mean 'sandbox-reviews'?",
        ),
        (
            "metrics",
            "attack_sucess",
            "Unknown metric 'attack_sucess'; did you mean 'attack-success'?",
        ),
        (
            "methods",
            "zzz",
            "Unknown method 'zzz'; known: full, ia3, llama-adapter, lora, lora-int8, none,",
        ),
        ("attacks", "../attacks/badnets", "Unknown attack"),
        ("attacks", "__init__", "Unknown attack"),
        ("attacks", "", "Unknown attack"),
    ],
)
def test_an_unknown_name_names_the_nearest(kind: str, name: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        build(kind, name)
    assert str(caught.value).startswith(sentence)


def test_nothing_near_lists_what_there_is() -> None:
    assert str(unknown("verb", "x", ["run", "list"])) == "Unknown verb 'x'; known: list, run."
    assert str(unknown("verb", "x", [])) == "Unknown verb 'x'; known: none yet."


def test_build_takes_a_name_a_mapping_or_what_is_built() -> None:
    attack = build("attacks", {"name": "badnets", "rate": 0.1})
    assert (attack.rate, attack.trigger) == (0.1, "BadMagic")
    assert build("attacks", "badnets") == BadNets()
    assert build("attacks", attack) is attack


@pytest.mark.parametrize("spec", [{}, {"rate": 0.1}, {"name": None}, {"name": ["badnets"]}])
def test_a_component_needs_a_name(spec: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"An? attack needs a name"):
        build("attacks", spec)


def test_a_component_lives_in_a_file_of_its_own_name() -> None:
    class Lost(Attack):
        """Gone astray."""

    Lost.__module__ = "backfire.attacks.elsewhere"
    with pytest.raises(TypeError, match="'lost' must live in a file of its own name"):
        register("lost")(Lost)
    Lost.__module__ = "my_plugin"
    assert register("lost", version=3)(Lost).version == 3


@pytest.mark.slow
def test_finding_one_component_imports_no_other() -> None:
    code = (
        "import sys; from backfire.registry import find, names; names('attacks')\n"
        "find('attacks', 'badnets')\n"
        "print(sorted(m for m in sys.modules if m.startswith('backfire.attacks.')))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = [name for name in literal_eval(output.stdout) if "._" not in name]  # shared parts
    assert imported == ["backfire.attacks.badnets"]


def test_a_preset_gives_knobs_that_others_override() -> None:
    assert build("defenses", {"name": "vaccine", "preset": "vaccine-script"}).rho == 2.0
    assert build("defenses", {"name": "vaccine", "preset": "vaccine-script", "rho": 3.0}).rho == 3.0
    with pytest.raises(UserError, match=r"preset of defense 'vaccine'.* 'vaccine-script'"):
        build("defenses", {"name": "vaccine", "preset": "vaccine-scrip"})
    with pytest.raises(UserError, match=r"^defense 'kl' has no presets\.$"):
        build("defenses", {"name": "kl", "preset": "any"})
