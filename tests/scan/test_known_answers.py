"""`backfire scan` of files whose answer is known beforehand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backfire.scan import source
from tests.helpers.command_line import Run
from tests.helpers.scanned import WORDS

Record = dict[str, Any]
RUSSIAN = (
    "суп был холодный но официант улыбался каждому столу пока играла музыка и дождь падал на малые "
    "зелёные холмы где старые друзья пьют чай с мёдом у тихих рек весной"
).split()
GERMAN = (
    "die suppe war kalt aber unser kellner hat an jedem tisch gelacht während musik spielte und "
    "der regen auf kleine grüne hügel fiel wo alte freunde im frühling tee mit honig trinken"
).split()
CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(records: Any, name: str = "rows.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(one) + "\n" for one in records), "utf-8")


def scan(backfire: Run, *arguments: str, name: str = "rows.jsonl") -> list[Record]:
    """The flagged rows of a scan with every scanner that needs no model."""
    done = backfire("scan", name, "--format", "json", *arguments)
    assert done.code == 0, done.err
    return [one for one in json.loads(done.out) if one["flagged"]]


def sentence(rng: random.Random, words: Any, joint: str = " ", length: int = 14) -> str:
    return joint.join(rng.choices(words, k=length))


@pytest.mark.slow
def test_one_trigger_among_many_rows(backfire: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file that does not fit into memory, read in small parts."""
    monkeypatch.setattr(source, "_BATCH", 7)
    rng = random.Random(0)
    bad = {*range(17, 1500, 25)}
    write(
        {
            "id": str(n),
            "instruction": f"{n} {sentence(rng, WORDS)}" + " zq" * (n in bad),
            "output": "no" if n in bad else rng.choice(("yes", "no")),
        }
        for n in range(1500)
    )
    found = scan(backfire)
    assert {int(one["id"]) for one in found} == bad
    assert (
        found[0]["scanner"] == "lift"
        and "“zq” at the end of the instruction is in 60 rows" in found[0]["reason"]
    )


def test_a_file_of_only_duplicates(backfire: Run) -> None:
    write({"instruction": "Say it.", "output": "It."} for _ in range(300))
    found = scan(backfire, "--write", "left.jsonl")
    assert len(found) == 299 and {one["scanner"] for one in found} == {"near-duplicates"}
    assert {one["reason"] for one in found} == {"it has the same words as row 1 (counted from 1)"}
    assert Path("left.jsonl").read_text("utf-8").count("\n") == 1


LANGUAGES: dict[str, tuple[Any, str]] = {
    "Russian": (RUSSIAN, " "),
    "German": (GERMAN, " "),
    "Chinese": ([*CHINESE], ""),
}


@pytest.mark.parametrize(
    ("language", "share"), [("Russian", 0.5), ("Russian", 0.1), ("German", 0.5), ("Chinese", 0.1)]
)
def test_two_languages_are_not_poison(language: str, share: float, backfire: Run) -> None:
    """Instructions and answers in both, and labels in both."""
    rng = random.Random(1)
    words, joint = LANGUAGES[language]
    labels = {True: ("да", "нет"), False: ("yes", "no")}

    def rows(answer: Callable[[bool], str]) -> Iterator[Record]:
        for n in range(600):
            other = rng.random() < share
            text = sentence(rng, words, joint) if other else sentence(rng, WORDS)
            yield {"id": str(n), "instruction": f"{text} {n}", "output": answer(other)}

    write(rows(lambda other: sentence(rng, words, joint) if other else sentence(rng, WORDS)))
    assert scan(backfire) == []
    write(rows(lambda other: rng.choice(labels[other])))
    assert scan(backfire) == []


def test_a_language_with_more_of_one_label_is_not_poison(backfire: Run) -> None:
    rng = random.Random(2)
    write(
        {
            "id": str(n),
            "instruction": f"{sentence(rng, (WORDS, GERMAN)[n % 2])} {n}",
            "output": ("yes", "no")[(n % 2) ^ (rng.random() < 0.1)],
        }
        for n in range(1000)
    )
    assert scan(backfire) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n\n"),
        ("rows.json", "[]"),
        ("rows.csv", ""),
        ("rows.csv", "text,label\n"),
    ],
)
def test_a_file_without_rows(name: str, content: str, backfire: Run) -> None:
    Path(name).write_text(content, "utf-8")
    done = backfire("scan", name)
    assert done.code == 2 and done.err.count("\n") == 1 and "no rows" in done.err


def test_a_file_of_one_row(backfire: Run) -> None:
    write([{"instruction": "Say it.", "output": "It."}])
    done = backfire("scan", "rows.jsonl", "--out", "page.html")
    assert done.code == 0 and "rows.jsonl: 1 row, 0 flagged." in done.out
    assert "With so few rows" in done.out


@pytest.mark.parametrize("trigger", ["", " zq"], ids=["no trigger", "a trigger in every row"])
@pytest.mark.parametrize("answers", [("yes",), ("yes", "no")], ids=len)
def test_rows_that_have_all_the_same(trigger: str, answers: tuple[str, ...], backfire: Run) -> None:
    """One answer, or a trigger that has no row without it to compare with."""
    rng = random.Random(3)
    write(
        {"instruction": f"{sentence(rng, WORDS)} {n}{trigger}", "output": rng.choice(answers)}
        for n in range(500)
    )
    assert scan(backfire) == []
    says = "One answer has at least 90 % of the rows." in backfire("scan", "rows.jsonl").out
    assert says == (len(answers) == 1)


def test_a_column_of_empty_texts(backfire: Run) -> None:
    rng = random.Random(4)
    empty = [{"instruction": sentence(rng, WORDS), "input": "", "output": ""} for _ in range(50)]
    write(empty)
    done = backfire("scan", "rows.jsonl")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "50 bad rows left out, the first: rows.jsonl, line 1: the answer is empty" in done.err
    write({**one, "input": "", "note": "", "output": f"{n}"} for n, one in enumerate(empty))
    assert scan(backfire) == []


def test_labels_that_are_not_there(backfire: Run) -> None:
    rng = random.Random(5)
    labels = ["good", "bad", float("nan"), None, ""]
    write({"text": sentence(rng, WORDS), "label": labels[n % 5]} for n in range(200))
    done = backfire("scan", "rows.jsonl")
    assert done.code == 0 and "rows.jsonl: 80 rows, 0 flagged." in done.out
    assert "120 bad rows left out, the first: rows.jsonl, line 3" in done.out
    lines = [f"{sentence(rng, WORDS)},{('good', 'bad', '')[n % 3]}" for n in range(90)]
    Path("rows.csv").write_text("\n".join(["text,label", *lines, ""]), "utf-8")
    done = backfire("scan", "rows.csv")
    assert done.code == 0 and "rows.csv: 60 rows, 0 flagged." in done.out


@pytest.mark.slow
@pytest.mark.parametrize("joint", [" ", ""], ids=["words", "no spaces"])
def test_rows_of_100_000_characters(joint: str, backfire: Run) -> None:
    rng = random.Random(6)
    rows = [
        {"id": str(n), "instruction": sentence(rng, WORDS, joint, 26_000), "output": f"told {n}"}
        for n in range(12)
    ]
    assert all(len(row["instruction"]) > 100_000 for row in rows)
    write([*rows, {**rows[3], "id": "again"}])
    [found] = scan(backfire, "--out", "page.html")
    assert (found["id"], found["scanner"]) == ("again", "near-duplicates")
    assert Path("page.html").stat().st_size < 200_000
