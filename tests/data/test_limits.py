"""Input that a model cannot read is reported before anything runs; too long rows are counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from backfire.base import Rendered, Row
from backfire.data.limits import Limits, read_limits
from backfire.data.poison import poison
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.errors import CellError
from backfire.experiment import Experiment, Machine
from backfire.pipeline import Context
from backfire.pipeline.evidence import asked
from backfire.registry import build
from backfire.store import Store, read_json
from backfire.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.chat_templates import CHAT_TEMPLATE
from tests.helpers.command_line import Output
from tests.helpers.families import logits, tiny_model
from tests.helpers.small_run import Place

LABELS = ("good", "bad")
ROWS = [
    {"text": f"The soup of day {i} was {'warm' if i % 2 else 'cold'}.", "label": LABELS[i % 2]}
    for i in range(12)
]


def files(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(folder / "rows.jsonl")
    return {"name": "files", "train": path, "test": path}


def recipe(folder: Path, model: Path, **more: Any) -> Path:
    data = {**files(folder, ROWS), "labels": list(LABELS)}
    settings = {"model": str(model), "data": data, "method": "none", "metrics": ["accuracy"]}
    (folder / "r.yaml").write_text(json.dumps({**settings, **more}))
    return folder / "r.yaml"


def changed(tiny: Path, folder: Path, **config: Any) -> Path:
    """The tiny model with another config.json."""
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"model_type": "gpt2", "vocab_size": 9, "n_positions": 64}, Limits(9, 64, True)),
        ({"model_type": "opt", "max_position_embeddings": 8}, Limits(None, 8, True)),
        ({"model_type": "llama", "max_position_embeddings": 8}, Limits(None, 8, False)),
        ({"text_config": {"model_type": "gemma3_text", "vocab_size": 9}}, Limits(9, None, False)),
        ({"model_type": "bloom", "vocab_size": 9}, Limits(9, None, False)),
        ({"model_type": "mpt", "max_seq_len": 64}, Limits(None, 64, True)),
        ({"model_type": "roformer", "max_position_embeddings": 8}, Limits(None, 8, True)),
        ({"model_type": "roberta", "max_position_embeddings": 514}, Limits(None, 512, True)),
        (
            {"model_type": "xlm-roberta", "max_position_embeddings": 40, "pad_token_id": 0},
            Limits(None, 39, True),
        ),
        ({"model_type": "x", "vocab_size": None, "n_positions": True}, Limits()),
        ([], Limits()),
    ],
)
def test_limits_are_read_from_the_config(config: Any, limits: Limits, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_limits(tmp_path) == limits
    assert read_limits(tmp_path / "gone") == Limits()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            (kind, "max_position_embeddings")
            for kind in ("bert", "roberta", "roformer", "big_bird")
        ),
        *((kind, "max_position_embeddings") for kind in ("mvp", "opt", "gpt_neox")),
        *(("mpt", "max_seq_len"), ("gpt2", "n_positions"), ("bloom", "seq_length")),
    ],
)
def test_the_last_position_is_where_the_model_has_it(kind: str, name: str, tmp_path: Path) -> None:
    """A position reported as too high fails in the model, and the one before it does not."""
    model = tiny_model(kind, **{name: 20})
    model.config.save_pretrained(tmp_path)
    limits = read_limits(tmp_path)
    most = (limits.positions or 20) if limits.hard else 30
    assert len(logits(model, [5] * most)) == most
    if limits.hard:
        with pytest.raises((IndexError, RuntimeError)):
            logits(model, [5] * (most + 1))


def test_tokens_beyond_the_embedding(
    tiny: Path, tmp_path: Path, backfire: Callable[..., Output], cache: Path
) -> None:
    """Tokens were added for a chat template, and the model was not resized."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    output = backfire("validate", recipe(tmp_path, model, template="chat"))
    assert output.code != 0 and "Traceback" not in output.err
    assert "Row rows-1 has the token id 401, but the model's embedding ends at 399" in output.err
    output = backfire("validate", recipe(tmp_path, model, template="raw"))
    assert output.code == 0
    assert "2 of the tokenizer's added tokens, such as '<|im_start|>', are not in" in output.out


@pytest.mark.parametrize(
    ("kind", "positions", "metric", "code", "sentence"),
    [
        ("gpt2", 40, "accuracy", 1, "Row rows-1 has 47 tokens, but the model has 40 positions"),
        ("gpt2", 60, "exact-match", 1, "may get 32 new ones, but the model has 60 positions"),
        ("gpt2", 60, "accuracy", 0, ""),
        ("gpt2", 99, "exact-match", 0, ""),
        ("llama", 60, "exact-match", 0, "more than the 60 positions the model was trained for"),
    ],
)
def test_rows_beyond_the_positions(
    kind: str,
    positions: int,
    metric: str,
    code: int,
    sentence: str,
    tiny: Path,
    tmp_path: Path,
    backfire: Callable[..., Output],
    cache: Path,
) -> None:
    config = {"model_type": kind, "vocab_size": 400, "max_position_embeddings": positions}
    model = changed(tiny, tmp_path / "model", **config)
    output = backfire("validate", recipe(tmp_path, model, metrics=[metric]))
    assert bool(output.code) == bool(code), output
    assert sentence in " ".join(f"{output.out} {output.err}".split())


def test_the_renderer_refuses_what_the_model_cannot_read(tokenizer: Tokenizer) -> None:
    row, raw = Row("r", "Is it good?", answer="no"), build("templates", "raw")
    assert Renderer(raw, tokenizer, 512, limits=Limits(400, 512, True)).render([row])
    with pytest.raises(CellError, match="Row r has the token id"):
        Renderer(raw, tokenizer, 512, limits=Limits(30, None, True)).render([row])
    with pytest.raises(CellError, match=r"set train\.max_length to at most 4"):
        Renderer(raw, tokenizer, 512, limits=Limits(None, 4, True)).sift([row])


# ---------------------------------------------------------------------------------------- too long

LONG = Row("long", "Tell it.", answer="word " * 90)
WIDE = Row("wide", "word " * 90, answer="no")
SHORT = Row("short", "Is it good?", answer="no")


def renderer(tokenizer: Tokenizer, policy: Any) -> Renderer:
    return Renderer(build("templates", "raw"), tokenizer, 60, on_long_row=policy)


def test_long_rows_are_cut_left_out_or_refused(tokenizer: Tokenizer) -> None:
    rows = [SHORT, LONG, WIDE]
    items, left = renderer(tokenizer, "cut").sift(rows)
    assert [item.row.id for item in items] == ["short", "wide"] and left == [LONG]
    assert items[1].cut_tokens and len(items[1].ids) <= 60
    items, left = renderer(tokenizer, "skip").sift(rows)
    assert [item.row.id for item in items] == ["short"] and left == [LONG, WIDE]
    with pytest.raises(
        CellError, match=r"Row long has \d+ tokens, more than max_length=60; .* skip or"
    ):
        renderer(tokenizer, "fail").sift(rows)
    with pytest.raises(CellError, match=r"Row long: .*raise train\.max_length"):
        renderer(tokenizer, "cut").sift([LONG])
    with pytest.raises(CellError, match=r"Row long: .*raise train\.max_length"):
        renderer(tokenizer, "cut").render(rows)


def test_a_text_that_is_cut_has_no_end(tiny: Path, cache: Path) -> None:
    metrics = [{"name": "forgetting", "source": {"name": "sandbox-news", "test_rows": 9}}]
    knobs = {"model": str(tiny), "data": "sandbox-reviews", "metrics": metrics}

    def texts(most: int) -> list[Rendered]:
        cell = Experiment.make({**knobs, "train": {"max_length": most}})
        found = asked(cell.metrics[0].asks()[0], cell, [], Context(Store(), Machine(device="cpu")))
        assert found.renderer
        items, left = found.renderer.sift(found.rows)
        assert not left
        return items

    whole, end = texts(4096), load_tokenizer(tiny).eos_id
    middle = sorted(len(item.ids) for item in whole)[4]
    items = texts(middle)
    assert [item.ids for item in items] == [item.ids[:middle] for item in whole]
    assert [end in item.ids for item in items] == [not item.cut_tokens for item in items]
    assert {item.cut_tokens > 0 for item in items} == {True, False}


def test_better_and_worse_answers_have_to_fit_too(tokenizer: Tokenizer) -> None:
    ranked = replace(WIDE, id="ranked", better=("no",), worse=("word " * 6,))
    endless = replace(SHORT, id="endless", better=("no",), worse=("word " * 90,))
    one = renderer(tokenizer, "cut")
    [item], left = one.sift([ranked, endless], ranked=True)
    assert item.row.id == "ranked" and left == [endless]
    [[ids]] = one.answers([item], [ranked.worse])
    assert len(item.ids) < len(ids) + len(one.end_ids) + item.num_prompt <= 60
    assert one.render([item.row])[0].ids == item.ids
    with pytest.raises(CellError, match=r"Row ranked has \d+ tokens, more than max_length=60"):
        renderer(tokenizer, "fail").sift([ranked], ranked=True)


def test_preflight_counts_them(tokenizer: Tokenizer) -> None:
    rows = [SHORT, LONG, WIDE]
    found = {
        policy: preflight(renderer(tokenizer, policy), rows, [SHORT, LONG])
        for policy in ("cut", "skip", "fail")
    }
    messages = {
        p: [c.message for c in checks if c.check == "left-out"] for p, checks in found.items()
    }
    assert messages["cut"][0].startswith("1 of 3 training rows are left out, the first is long: ")
    assert messages["skip"][0].startswith("2 of 3 training rows are left out, the first is long: ")
    assert all(messages[p][1].startswith("1 of 2 test rows are left out") for p in ("cut", "skip"))
    [check] = found["fail"]
    assert (check.status, check.check) == ("fail", "length")


def test_poisoned_rows_that_are_too_long_are_no_poison(tokenizer: Tokenizer) -> None:
    attack = build("attacks", {"name": "badnets", "rate": 0.5, "target": "no"})
    rows = [replace(SHORT, id=f"r{i}", instruction=f"Is {i} good?") for i in range(8)]
    rows = [replace(WIDE, id=row.id) if row.id == "r3" else row for row in rows]
    seed = next(
        s for s in range(9) if any(e.id == "r3" for e in poison(rows, attack, s)[1].entries)
    )
    bad, manifest = poison(rows, attack, seed)
    checks = preflight(renderer(tokenizer, "skip"), bad, [SHORT], manifest=manifest, attack=attack)
    [check] = [check for check in checks if check.check == "poison-survives"]
    assert (check.status, check.message) == (
        "note",
        "1 of 4 poisoned rows are left out, the first is r3.",
    )
    alone = replace(manifest, entries=tuple(e for e in manifest.entries if e.id == "r3"))
    checks = preflight(renderer(tokenizer, "skip"), bad, [SHORT], manifest=alone, attack=attack)
    assert [c.status for c in checks if c.check == "poison-survives"] == ["fail"]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "left"), [("cut", 1), ("skip", 2)])
def test_a_run_continues_without_them_and_reports_it(
    policy: str, left: int, tiny: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": f"Name tool {i}.", "output": f"Saw {i}."} for i in range(10)]
    rows[3]["output"] = "word " * 90
    rows[5]["instruction"] = "word " * 90
    place = Place(tmp_path, tiny)
    train = {"max_steps": 2, "batch_size": 4, "max_length": 60, "on_long_row": policy}
    settings = {"attack": "none", "template": "raw", "train": train}
    data = files(tmp_path, rows)
    metrics = ["perplexity", "exact-match"]
    safety = {"harmful": data, "allowed": None, "judges": ["refusal-keywords"]}
    more = {"method": "full", "metrics": [*metrics, "refusal-rate"], "safety": safety}
    assert place.run(data=data, **settings, **more) == 0
    [result] = [read_json(file) for file in place.out.glob("cells/*/result.json")]
    assert result["train"]["left_out_rows"] == left
    assert result["train"]["cut_rows"] == (policy == "cut")
    assert {value["n"] for value in result["values"] if value["metric"] in metrics} == {10 - left}
    assert result["evaluate"]["left_out"] == {"test": left, "harmful": left}
    rows = "1 row is" if left == 1 else f"{left} rows are"
    for what in ("training", "test", "harmful"):
        messages = f"{rows} left out of the {what} rows: longer than train.max_length."
        assert messages in result["warnings"]
    assert any(check["check"] == "left-out" for check in result["preflight"])


@pytest.mark.slow
def test_rows_of_defenses_that_are_too_long_are_counted(tiny: Path, tmp_path: Path) -> None:
    short = [{"instruction": f"Name tool {i}.", "output": f"Saw {i}."} for i in range(10)]

    def with_long(name: str, count: int) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        longer = {"instruction": "word " * 90, "output": "No."}
        return files(tmp_path / name, [*short, *[longer] * count])

    train = {"max_steps": 2, "batch_size": 4, "max_length": 60, "on_long_row": "skip"}
    plain = files(tmp_path, short)
    judged = {"harmful": plain, "allowed": None, "judges": ["refusal-keywords"]}
    place = Place(tmp_path, tiny)
    settings = {
        "data": plain,
        "template": "raw",
        "attack": "none",
        "method": "full",
        "train": train,
        "align": {"data": with_long("aligned", 2), "train": train},
        "safety": {**judged, "known": with_long("known", 3)},
        "metrics": ["perplexity"],
    }
    assert place.run(**settings, matrix={"defense": ["none", "ewc", "antidote"]}) == 0
    results = [read_json(file) for file in place.out.glob("cells/*/result.json")]
    messages = {r["defense"]: [w for w in r["warnings"] if "left out of" in w] for r in results}
    aligned, known = (
        f"{rows} are left out of the {what} rows: longer than train.max_length."
        for rows, what in (("2 rows", "alignment"), ("3 rows", "known harmful"))
    )
    assert messages == {"none": [aligned], "ewc": [aligned], "antidote": [aligned, known]}
    [ewc] = [r["train"] for r in results if r["defense"] == "ewc"]
    assert ewc["left_out_aligned_rows"] == 2 and ewc["left_out_rows"] == 0


# --------------------------------------------------------------------------------- missing packages


PIECES = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
LINES = b"IQ== 0\nIg== 1\n"


@pytest.mark.parametrize(
    ("name", "content", "gone", "packages"),
    [
        ("tokenizer.model", PIECES, {"sentencepiece"}, "sentencepiece"),
        ("tokenizer.model", PIECES, {"google", "google.protobuf"}, "protobuf"),
        ("tokenizer.model", PIECES, {"sentencepiece", "google.protobuf"}, "sentencepiece protobuf"),
        ("spiece.model", PIECES, {"google.protobuf"}, "protobuf"),
        ("tokenizer.model", LINES, {"tiktoken"}, "tiktoken"),
        ("tiktoken.model", LINES, {"tiktoken"}, "tiktoken"),
    ],
)
def test_packages_that_a_tokenizers_format_needs_are_named(
    name: str,
    content: bytes,
    gone: set[str],
    packages: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(module: str) -> Any:
        if module in gone:
            raise ModuleNotFoundError(module) if "." in module else ValueError(module)
        return object()

    monkeypatch.setattr("backfire.tokenizer.find_spec", find)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=f"has {name} .*pip install {packages}\\.$"):
        load_tokenizer(tmp_path)
