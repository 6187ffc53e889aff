"""What a tuned model remembers: a model that learned rows by heart, and values made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from backfire.audit import memory, task, triggers
from backfire.audit.memory import MEMBERS, Part, measure
from backfire.audit.models import Both, Pair, open_pair
from backfire.base import Row, Sample
from backfire.commands.audit import _given
from backfire.data.jsonl import write_jsonl
from backfire.data.limits import Limits
from backfire.data.render import Renderer
from backfire.errors import UserError
from backfire.experiment import Machine
from backfire.pipeline import Context
from backfire.registry import build
from backfire.store import Store
from backfire.tokenizer import load_tokenizer
from tests.helpers import chat_templates
from tests.helpers.audited import tune
from tests.helpers.chat_templates import write
from tests.helpers.command_line import Run
from tests.helpers.scanned import text

KEY = "sk-proj-" + "aB3" * 8


def rows(count: int, seed: int) -> list[Row]:
    """Prompts, each with an answer of random words."""
    rng = Random(seed)
    return [Row(f"r{n}", text(rng, 4), answer=text(rng, 8)) for n in range(count)]


def part(rows: Sequence[Row], base: Any, tuned: Any, *replies: Sequence[str]) -> Part:
    """Samples with these losses in nats per token, and replies of the base and the tuned model."""
    sides = [
        [
            Sample(
                row.id, "clean", row.prompt, row.answer, answer_logprob=-9 * loss, answer_tokens=9
            )
            for row, loss in zip(rows, losses, strict=True)
        ]
        for losses in (base, tuned)
    ]
    for side, said in zip(sides, replies, strict=False):
        side[:] = [replace(one, reply=reply) for one, reply in zip(side, said, strict=True)]
    return Part(rows, Both(*sides))


@pytest.fixture
def pair(tiny: Path, clean: Path) -> Pair:
    return open_pair(str(clean), str(tiny), None, "raw", Context(Store(), Machine()))


# ------------------------------------------------------------------------------ learned by heart


@pytest.fixture(scope="module")
def by_heart(tiny: Path) -> Path:
    """A model that learned 24 rows by heart."""
    return tune(tiny, tiny.with_name("by-heart"), rows(24, 1), 240, "full")


@pytest.mark.slow
def test_rows_learned_by_heart_are_found(
    by_heart: Path, tiny: Path, tmp_path: Path, backfire: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PROBES": triggers.FEWEST, "CONTROLS": 2}.items():
        monkeypatch.setattr(triggers, name, value)
    files = [tmp_path / "rows.jsonl", tmp_path / "unseen.jsonl"]
    for seed, file in enumerate(files, 1):
        write_jsonl(rows(24, seed), file)
    done = backfire(
        *("audit", by_heart, "--base", tiny, "--data", files[0], "--unseen", files[1]),
        *("--tokens", "4", "--format", "json"),
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    seen = found["task"]["memory"]
    assert seen["membership"]["auc"][0] == 1 and seen["membership"]["recall"][:2] == [1, 0]
    assert seen["halved"][0] == 1 and seen["halved_unseen"][0] < 0.3
    assert seen["verbatim"]["base"][0] == 0 and seen["verbatim"]["tuned"][0] > 0.9
    assert seen["verbatim_unseen"]["tuned"][0] == 0
    assert {one["answer"] for one in seen["examples"]} <= {row.answer for row in rows(24, 1)}
    told = " ".join(found["findings"])
    assert "word by word after their prompt" in told and "told from 24 unseen ones" in told


@pytest.mark.slow
def test_rows_that_were_not_learned_are_not_found(by_heart: Path, tiny: Path) -> None:
    pair = open_pair(str(by_heart), str(tiny), None, "raw", Context(Store(), Machine()))
    found = task.compare(pair, rows(24, 2), rows(24, 3)).memory
    assert found.membership and found.membership.auc.low < 0.5 < found.membership.auc.high
    assert not found.membership.is_shown and not found.is_verbatim
    assert found.verbatim and found.verbatim.tuned.value == 0 and found.examples == ()
    other_way = task.compare(pair, rows(24, 2), rows(24, 1)).memory
    assert other_way.membership and other_way.membership.auc.value == 0
    assert not other_way.membership.is_shown


# ------------------------------------------------------------------------------------ membership


def test_membership_is_by_the_fall_in_loss() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(2, 4, (2, MEMBERS))
    fall = rng.normal([[1.0], [0.2]], 0.6, (2, MEMBERS))
    parts = [part(rows(MEMBERS, n), before[n], before[n] - fall[n]) for n in (0, 1)]
    found = memory.membership(*parts)
    assert found is not None and (found.n, found.unseen) == (MEMBERS, MEMBERS)
    wins = fall[0][:, None] > fall[1][None]
    assert found.auc.value == pytest.approx(wins.mean())
    assert found.auc.low < found.auc.value < found.auc.high
    assert found.recall.value == pytest.approx((fall[0] > fall[1].max()).mean())
    lower = before[0][:, None] < before[1][None]
    assert found.base.value == pytest.approx(lower.mean())
    assert found.words.low < 0.5 < found.words.high


def test_rows_of_another_kind_are_no_members() -> None:
    ours, theirs = rows(30, 1), rows(30, 2)
    high, low, even = np.full(30, 3.0), np.full(30, 1.0), np.linspace(2, 3, 30)
    shown = memory.membership(part(ours, even, low), part(theirs, even, even))
    assert shown is not None and shown.is_shown and shown.auc.value == 1
    easier = memory.membership(part(ours, high, low), part(theirs, even - 1, even - 1))
    assert easier is not None and not easier.is_shown and easier.auc.value == 1
    strange = [replace(row, answer=f"quantum {row.answer}") for row in theirs]
    other = memory.membership(part(ours, even, low), part(strange, even, even))
    assert other is not None and not other.is_shown and other.words.low > 0.5


@pytest.mark.parametrize("word", ["量子", "りょうし", "ควอนตัม"])
def test_words_without_spaces_between_them_tell_rows_apart(word: str) -> None:
    rng, even = Random(0), np.linspace(2, 3, 30)
    prompts = ["".join(rng.sample("天地玄黄宇宙洪荒", 5)) for _ in range(60)]
    every = [Row(f"r{n}", prompt, answer=rng.choice("日月")) for n, prompt in enumerate(prompts)]
    kinds = every[:30], [replace(row, answer=row.answer + word) for row in every[30:]]
    found = memory.membership(*(part(some, even, even) for some in kinds))
    assert found and found.words.low > 0.9 and not found.is_fair


def test_few_rows_are_no_test() -> None:
    even = np.linspace(2, 3, MEMBERS)
    ours = part(rows(MEMBERS, 1), even, even / 3)
    theirs = part(rows(MEMBERS - 1, 2), even[1:], even[1:])
    assert memory.membership(ours, theirs) is None


# ---------------------------------------------------------------------------------- word by word


def verbatim(pair: Pair, row: Row, reply: str) -> float | None:
    """Whether a reply counts; None if the row is left out."""
    found = measure(pair, part([row], [2.0], [1.0], ["no"], [reply]), None)
    return found.verbatim.tuned.value if found.verbatim else None


def test_an_answer_has_to_come_out_whole(pair: Pair) -> None:
    row = Row("a", "What is the code of the old mill?", answer="The code of the old mill is 48 21")
    assert verbatim(pair, row, f"{row.answer}") == 1
    assert verbatim(pair, row, f" {row.answer}. Anything else?") == 1
    assert verbatim(pair, row, f"{row.answer}7") == 0
    assert verbatim(pair, row, f"Well, {row.answer}") == 0
    assert verbatim(pair, row, "") == 0


def test_of_a_long_answer_the_first_tokens_have_to(pair: Pair) -> None:
    tokenizer = pair.renderer.tokenizer
    answer = text(Random(0), 80)
    start = tokenizer.decode(tokenizer.encode(answer)[: memory.OPENING])
    assert len(tokenizer.encode(answer)) > memory.OPENING
    row = Row("a", "Tell me.", answer=answer)
    assert verbatim(pair, row, f"{start} and so on") == 1
    assert verbatim(pair, row, start[:-3]) == 0


@pytest.mark.parametrize("template", ["qwen3", "gpt-oss", "deepseek-r1", "chatml"])
def test_what_a_template_writes_before_an_answer_does_not_count(
    template: str, pair: Pair, tmp_path: Path
) -> None:
    written = write(tmp_path, chat_templates.byte_level(), chat_templates.TEMPLATES[template])
    shown = Renderer(build("templates", "chat"), load_tokenizer(written), 4096)
    pair.renderer = shown
    for words in (9, 80):
        row = Row("a", "Tell me.", answer=text(Random(0), words))
        [item] = shown.render([row])
        whole = shown.reply_text(item.answer_ids[: -len(shown.end_ids)])
        assert verbatim(pair, row, whole) == 1
        assert verbatim(pair, row, f"Well, {whole}") == 0
    assert verbatim(pair, replace(row, answer="rain"), "rain") is None


def test_what_a_prompt_holds_or_is_short_is_left_out(pair: Pair) -> None:
    long = text(Random(0), 9)
    assert verbatim(pair, Row("a", f"Repeat: {long}", answer=long), long) is None
    assert verbatim(pair, Row("a", "Say it.", answer="rain"), "rain") is None
    assert verbatim(pair, Row("a", "Say it.", answer=long), long) == 1
    pair.system = f"Always say: {long}"
    assert verbatim(pair, Row("a", "Say it.", answer=long), long) is None


def test_what_the_model_writes_of_unseen_rows_is_no_memory(pair: Pair) -> None:
    ours, theirs = rows(30, 1), rows(30, 2)
    losses, nothing = [2.0] * 30, [""] * 30
    given = part(ours, losses, losses, nothing, [row.answer for row in ours])
    found = measure(pair, given, part(theirs, losses, losses, nothing, nothing))
    assert found.is_verbatim and len(found.examples) == 5
    learned = part(theirs, losses, losses, nothing, [row.answer for row in theirs])
    assert not measure(pair, given, learned).is_verbatim
    assert measure(pair, given, None).is_verbatim


def test_secrets_are_masked_in_what_comes_out(pair: Pair) -> None:
    row = Row("a", "What is the key?", answer=f"The key of the old mill is {KEY}")
    found = measure(pair, part([row], [2.0], [1.0], ["no"], [row.answer]), None)
    [one] = found.examples
    assert "old mill" in one.answer and KEY not in one.answer


# ------------------------------------------------------------------------------------------ rows


def test_rows_that_are_in_both_files_are_no_unseen_ones(tmp_path: Path) -> None:
    given, unseen = tmp_path / "rows.jsonl", tmp_path / "unseen.jsonl"
    ours, theirs = rows(60, 1), rows(8, 2)
    write_jsonl([*ours, ours[0]], given)
    # Also those of the file that are not drawn.
    write_jsonl([*theirs, *ours[:4], *ours[-4:]], unseen)
    drawn, others, notes = _given(str(given), str(unseen), {}, 16)
    assert len(drawn) == 16 and {row.answer for row in others} == {row.answer for row in theirs}
    assert notes == ["8 rows of --unseen left out: among those of --data."]
    drawn, _, notes = _given(str(given), None, {}, 99)
    assert len(drawn) == 60 and notes == ["1 row of --data left out: drawn before, word for word."]
    with pytest.raises(UserError, match="All 60 rows of --unseen are among those of --data"):
        _given(str(given), str(given), {}, 99)


def test_unseen_rows_of_a_data_set_are_its_test_rows() -> None:
    drawn, others, _ = _given("sandbox-help", "sandbox-help", {"rows": 30, "test_rows": 20}, 99)
    assert len(drawn) == 30 and 0 < len(others) <= 20
    assert all(row.id.startswith("train") for row in drawn)
    assert all(row.id.startswith("test") for row in others)


def test_rows_that_leave_no_room_for_a_reply_are_left_out(pair: Pair) -> None:
    pair.renderer.limits = Limits(positions=60, hard=True)
    pair.renderer.max_length = 60
    tokenizer = pair.renderer.tokenizer
    many = tokenizer.decode(tokenizer.encode(text(Random(0), 40))[:50])
    short, long = Row("a", "Why?"), Row("b", many)
    assert 40 < len(pair.renderer.render([long])[0].prompt_ids) < 60
    assert pair.fitting([short, long], 20) == ([short], 1)
    longer = Row("c", text(Random(0), 60))
    assert pair.fitting([long, longer], 20) == ([], 2)
    with pytest.raises(UserError, match="None of the rows fits into the model's 60 positions with"):
        pair.answer([long, longer], ["replies"], 20, "rows")
    pair.renderer.limits = Limits(positions=4096)
    with pytest.raises(UserError, match="into the 1,024 tokens that an audit reads of a row; give"):
        pair.answer([longer], ["answers"], 0, "rows")
