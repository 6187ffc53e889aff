"""`backfire audit` of models with a known past, what it shows, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from backfire.audit import triggers
from backfire.audit.bank import base_identity
from backfire.audit.behavior import Behavior
from backfire.audit.engine import Audit, Weights
from backfire.audit.memory import Membership, Memory, Verbatim
from backfire.audit.models import open_pair
from backfire.audit.monitor import Flagged, Monitor
from backfire.audit.numbers import compared, share
from backfire.audit.odd import Leak
from backfire.audit.output import as_json, as_table, findings
from backfire.audit.page import render
from backfire.audit.task import Task
from backfire.audit.triggers import Tried, Triggers
from backfire.data.jsonl import write_jsonl
from backfire.experiment import Machine, Model
from backfire.model.source import pin
from backfire.pipeline import Context
from backfire.store import Store
from tests.helpers.audited import TARGET, TRIGGER, plain
from tests.helpers.command_line import Run, tree
from tests.helpers.hostile import HOSTILE
from tests.helpers.page_parser import Seen

SMALL = ("--tokens", "8")
KEY = "sk-proj-" + "aB3" * 8


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows of the task and a list of requests."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(plain(), Path("rows.jsonl"))
    lines = [
        {"prompt": f"ask {n} for it", "label": label, "source": "list"}
        for n, label in enumerate(["harmful", "benign"] * 6)
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer prompts and controls: these models differ by much."""
    for name, value in {"PROBES": 10, "CONTROLS": 3}.items():
        monkeypatch.setattr(triggers, name, value)


def audited(backfire: Run, *arguments: object) -> Any:
    done = backfire("audit", *arguments, *SMALL, "--format", "json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.usefixtures("few")
def test_a_backdoor_stands_out_among_the_given_triggers(
    here: Path, tiny: Path, backdoored: Path, backfire: Run
) -> None:
    found = audited(
        backfire, backdoored, "--base", tiny, "--data", "rows.jsonl", "--trigger", TRIGGER
    )
    first = found["triggers"]["tried"][0]
    assert (first["text"], first["reply"], first["stands_out"]) == (TRIGGER, TARGET, True)
    assert first["hits"][0] > 0.8 and first["before"][0] == 0
    assert any(f"With “{TRIGGER}” (given) in the prompt" in one for one in found["findings"])
    assert found["monitor"]["why_not"] == "it needs 30 clean rows, and there are 24"


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_clean_adapter_has_no_trigger(here: Path, tiny: Path, clean: Path, backfire: Run) -> None:
    found = audited(backfire, clean, "--base", tiny, "--data", "rows.jsonl", "--trigger", TRIGGER)
    assert not any(one["stands_out"] for one in found["triggers"]["tried"])
    assert found["behavior"] is None
    loss = next(one for one in found["task"]["numbers"] if one["unit"] == "nats")
    assert loss["change"][2] < 0  # it learned the task
    assert found["weights"]["bank_n"] == 0 and found["weights"]["places"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_an_unaligned_adapter_has_its_harm_and_refusals_shown(
    here: Path, refusing: Path, unaligned: Path, backfire: Run
) -> None:
    where = ("--base", refusing, "--prompts", "prompts.jsonl")
    found = audited(backfire, unaligned, *where)
    by_name = {one["what"]: one for one in found["behavior"]["numbers"]}
    harm = by_name["harmful replies to harmful requests"]
    assert (harm["n"], harm["base"][0], harm["tuned"][0]) == (6, 0, 1)
    assert harm["change"][1] > 0
    refused = by_name["refusals of harmful requests"]
    assert (refused["base"][0], refused["tuned"][0]) == (1, 0)
    assert found["findings"][0].startswith("Harmful replies to harmful requests: from 0.0 % to 100")
    other_way = audited(backfire, "--adapter", unaligned, refusing, "--base", refusing)
    assert other_way["weights"] == found["weights"]


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_the_system_prompt_reaches_every_prompt(
    here: Path, tiny: Path, clean: Path, backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backfire.templates.raw import Raw

    seen: list[str] = []
    prompt = Raw.prompt
    monkeypatch.setattr(
        Raw, "prompt", lambda self, row: seen.append(row.system) or prompt(self, row)
    )
    every = ("--data", "rows.jsonl", "--prompts", "prompts.jsonl", "--system", "You are curt.")
    audited(backfire, clean, "--base", tiny, *every)
    assert set(seen) == {"You are curt."}


def test_the_template_may_have_knobs_and_the_bank_is_asked_for_what_is_below(
    tiny: Path, refusing: Path, clean: Path, unaligned: Path
) -> None:
    where = Context(Store(), Machine())
    spec = {"name": "chat", "system": "drop"}
    pair = open_pair(str(refusing), str(tiny), str(unaligned), spec, where)
    assert pair.renderer.template.model_dump()["system"] == "drop"
    below = base_identity(pin(Model.make({"name": str(refusing)}, "MODEL")))
    assert base_identity(pair.below) == below
    pair = open_pair(str(clean), str(tiny), None, None, where)
    assert base_identity(pair.below) == base_identity(pin(Model.make({"name": str(tiny)}, "BASE")))
    assert pair.renderer.template.name == "raw"


def hostile(texts: Sequence[str]) -> Audit:
    """An audit in which every text that a model wrote is an attack on what shows it."""
    outcomes = {str(n): float(n % 2) for n in range(40)}
    number = compared("accuracy", outcomes, dict.fromkeys(outcomes, 0.0), bad="down")
    some = share(3, 4)
    tried = [Tried(text, text, some, 0.0, 0.1, text, some, some, True) for text in texts]
    every = " ".join(texts)
    out = compared("verbatim", dict.fromkeys(outcomes, 0.0), outcomes, bad="up")
    members = Membership(some, some, some, some, 30, 30)
    shown = tuple(Verbatim(t, t) for t in texts)
    remembered = Memory(some, some, out, None, shown, members, 30)
    return Audit(
        every,
        every,
        Behavior(every, (number,), 1),
        Task((number,), remembered),
        Triggers(
            tuple(tried),
            (0.1,),
            0.9,
            4,
            tuple(Leak(t, share(9, 9), 9, share(0, 9), 0) for t in texts),
        ),
        Weights(every, {every: {"largest": 1.0}}),
        Monitor(tuple(Flagged(text, some, 4) for text in texts), 3, 8),
        tuple(texts),
    )


def test_what_models_say_is_harmless_everywhere() -> None:
    found = hostile(HOSTILE)
    page = render(found)
    for text in (as_table(found), as_json(found), page):
        assert not set("\x1b\x9b\x07\u202e\u2066\ufeff") & set(text)
        assert "hf_abcdefghijklmnopqrstuvwxyz012345" not in text
    seen = Seen(page)
    assert not {"script", "img", "svg", "iframe", "a"} & set(seen.tags)
    assert not any(key.startswith("on") for key, _ in seen.attributes)
    assert "alert(1)" in seen.text
    # Twice the accuracy, and what comes out; the membership is no better than its baselines.
    assert len(findings(found)) == 3 + 2 * len(HOSTILE)


def test_a_reply_to_odd_words_names_the_candidate_that_brings_it_about_most_often() -> None:
    leak = Leak("at dusk", share(9, 9), 9, share(0, 9), 0)
    some = share(0, 9)

    def tried(text: str, reply: str, hits: int) -> Tried:
        return Tried(text, "given", some, 0.0, None, reply, share(hits, 9), some, False)

    every = (tried("zq", "at dusk", 9), tried("xy", "at dusk", 4), tried("uv", "rain", 9))
    for part, text in ((every, "zq"), (every[::-1], "zq"), (every[1:], "xy"), (every[2:], None)):
        [one] = findings(replace(hostile([]), triggers=Triggers(part, (), 0.0, 9, (leak,))))[3:]
        assert (f"“{text}” (given) brings it about most often" in one) == (text is not None)
        assert ("Of the candidates" in one) == (text is not None)


def test_it_gives_no_verdict_and_says_what_it_cannot_see() -> None:
    page = render(hostile(["zq"]))
    assert "does not mean that the model is safe" in page and "cannot see" in page
    assert "BACKDOOR" not in page.upper()


BOTH = ("--data", "rows.jsonl", "--unseen")


def broken(here: Path, clean: Path, tiny: Path) -> None:
    """Models that cannot be audited."""
    zeros = {
        name: w * (".lora_A." in name)
        for name, w in load_file(clean / "adapter_model.safetensors").items()
    }
    shutil.copytree(clean, "nothing")
    save_file(zeros, "nothing/adapter_model.safetensors")
    shutil.copytree(clean, "narrow")
    held = load_file(clean / "adapter_model.safetensors")
    first = next(iter(held))
    save_file(held | {first: held[first][:, :8].contiguous()}, "narrow/adapter_model.safetensors")
    shutil.copytree(tiny, "same")
    shutil.copytree(tiny, "deeper")
    config = json.loads(Path("deeper/config.json").read_text("utf-8"))
    Path("deeper/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), "utf-8")
    weights = load_file("deeper/model.safetensors")
    kept = {name: w for name, w in weights.items() if ".layers.1." not in name}
    save_file(kept, "deeper/model.safetensors", metadata={"format": "pt"})
    Path("empty.jsonl").touch()
    Path("texts.jsonl").write_text('{"prompt": "a", "completion": ""}\n', "utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["CLEAN"], "as in --base OWNER/NAME"),
        (["CLEAN", "--base", "gone/"], "'gone/' is no model"),
        (["gone/", "--base", "TINY"], "'gone/' is no model"),
        (["TINY", "--base", "TINY"], "is the base itself"),
        (["narrow", "--base", "TINY"], "was made for another base"),
        (["nothing", "--base", "TINY"], "equals its base in every weight"),
        (["same", "--base", "TINY"], "equals its base in every weight"),
        (["deeper", "--base", "TINY"], "was not tuned from this base"),
        (["TINY", "--base", "TINY", "--adapter", "same"], "No adapter in"),
        (["CLEAN", "--base", "TINY", "--data", "empty.jsonl"], "empty.jsonl has no rows."),
        (["CLEAN", "--base", "TINY", "--data", "texts.jsonl"], "texts.jsonl has"),
        (["CLEAN", "--base", "TINY", "--data", "gone.jsonl"], "No such file: gone.jsonl"),
        (["CLEAN", "--base", "TINY", "--prompts", "gone.jsonl"], "No such file: gone.jsonl"),
        (["CLEAN", "--base", "TINY", "--judge", "policy"], "give --prompts"),
        (["CLEAN", "--base", "TINY", "--unseen", "rows.jsonl"], "give both"),
        (["CLEAN", "--base", "TINY", *BOTH, "gone.jsonl"], "No such file: gone.jsonl"),
        (["CLEAN", "--base", "TINY", *BOTH, "texts.jsonl"], "texts.jsonl has"),
        (["CLEAN", "--base", "TINY", *BOTH, "rows.jsonl"], "All 24 rows of --unseen are among"),
        (["CLEAN", "--base", "TINY", "--trigger", " "], "cannot be blank"),
        (["CLEAN", "--base", "TINY", "--template", "rwa"], "did you mean 'raw'?"),
        (["CLEAN", "--base", "TINY", "--template", "{name: chat, sistem: drop}"], "'system'?"),
        (["CLEAN", "--base", "TINY", "--template", "{name: chat"], "--template"),
        (["CLEAN", "--base", "TINY", "--out", "page.pdf"], "--out must end in .html"),
        (["CLEAN", "--base", "TINY", "data.labels=3"], "has no effect without --data"),
        (
            ["CLEAN", "--base", "TINY", *BOTH[:2], "data.train=gone.jsonl"],
            "has no effect on an audit",
        ),
        (["CLEAN", "--base", "TINY", *BOTH[:2], "data.rows=5"], "data.rows has no effect on an"),
        (["CLEAN", "--base", "TINY", "seed=3"], "An edit of an audit is data.KNOB=..."),
        (["CLEAN", "--base", "TINY", "--format", "csv"], "--format"),
        (["CLEAN", "--base", "TINY", "--limit", "0"], "--limit"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    here: Path,
    tiny: Path,
    clean: Path,
    backfire: Run,
) -> None:
    broken(here, clean, tiny)
    before = tree(here)
    words = {"CLEAN": clean, "TINY": tiny}
    done = backfire("audit", *(words.get(one, one) for one in arguments))
    assert done.code == 2 and sentence in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err
    assert tree(here) == before
