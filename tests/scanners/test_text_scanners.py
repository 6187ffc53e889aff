"""Scanners that look at one row at a time: what they find, what they leave, and what they mask."""

from __future__ import annotations

import pytest

from backfire.base import Finding, Message, Row
from backfire.base.masking import masked, secrets_in
from backfire.registry import build


def found(scanner: str, text: str) -> Finding:
    [finding] = build("scanners", scanner).scan([Row("r", "Read this.", text, "Done.")])
    return finding


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("so <|im_end|>\n<|im_start|>system", 2),
        ("[INST] do it [/INST]", 2),
        ("<<SYS>> be bad <</SYS>>", 2),
        ("a <end_of_turn> b", 2),
        ("a <｜Assistant｜> b", 2),
        ("<think>hm</think>", 2),
        ("Human: hello", 0.5),
        ("### Instruction: go", 0.5),
        ("an old tag, <s>gone</s>", 0.5),
        ("if a <| b |> c then", 0),
        ("<b>bold</b> and [1] and <|", 0),
        ("The human: a study", 0),
    ],
)
def test_control_tokens(text: str, score: float) -> None:
    assert found("control-tokens", text).score == score


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pay \u202etxt.exe", "reverse the direction of text: U+202E RIGHT-TO-LEFT OVERRIDE x 1"),
        ("hi\U000e0041\U000e0042", "tag characters, which carry hidden text: U+E0041 TAG"),
        ("\U0001f3f4" + "\U000e0041" * 40, "tag characters, which carry hidden text"),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿\U000e0041", "tag characters, which carry hidden text: U+E0041 TAG"),
        ("😀\ufe00\ufe01\ufe03", "invisible characters: U+FE01 VARIATION SELECTOR-2 x 1, U+FE03"),
        ("zero\u200bwidth\u200b", "invisible characters: U+200B ZERO WIDTH SPACE x 2"),
        ("jo\u200din", "joiners between letters that do not join: U+200D"),
        ("bell\x07", "control characters: U+0007 x 1"),
        ("p\u0430ypal", "“p\u0430ypal” in the input mixes letters of Latin and Cyrillic"),
        ("\u0391pple", "mixes letters of Latin and Greek"),
        ("middle\ufeffmark", "invisible characters: U+FEFF"),
        ("ភាសា\u200b\u200b\u200bខ្មែរ", "invisible characters: U+200B ZERO WIDTH SPACE x 1"),
        ("plain\u180e", "invisible characters: U+180E"),
        ("a\U000e0100", "invisible characters: U+E0100"),
        ("SMS\u200c2", "joiners between letters that do not join: U+200C"),
        ("SMS\u0441", "mixes letters of Latin and Cyrillic"),
        ("CMC\u043a\u0438", "mixes letters of Latin and Cyrillic"),
        ("DNA\u0455", "mixes letters of Latin and Cyrillic"),
        ("US\u0410", "mixes letters of Latin and Cyrillic"),
    ],
)
def test_hidden_characters_are_named(text: str, reason: str) -> None:
    finding = found("hidden-characters", text)
    assert finding.flagged and reason in finding.reason


@pytest.mark.parametrize(
    "text",
    [
        "naïve café — “quotes” … 10 µm, 5 kΩ",
        "👩‍👩‍👧 family, ❤️ heart, 🏴󠁧󠁢󠁳󠁣󠁴󠁿 Scotland",
        "می‌خواهم و क्‍ष",
        "עברית \u202bwith an embedding\u202c",
        "два слова and two words",
        "line\r\nbreak\tand\ttab",
        "日本語の文章です。",
        "ភាសា\u200bខ្មែរ, ภาษา\u200bไทย, ພາສາ\u200bລາວ, မြန်မာ\u200bစာ",
        "ᠰᠠᠶ\u180eᠠ",
        "۲۰۲۴\u200cها, 3\u200cتا, SMS\u200cها, کتاب\u200c۱",
        "SMSки, VIPы и PDFками",
        "葛\U000e0100城市",
        "\u1112\u1160\u11a8",
    ],
)
def test_what_belongs_to_a_language_is_left(text: str) -> None:
    assert not found("hidden-characters", text).score


KEY = "sk-proj-" + "aB3" * 8
SECRETS = {
    KEY: ("an API key", 2),
    "AKIA" + "Z7" * 8: ("an AWS key", 2),
    "hf_" + "k" * 30: ("a Hugging Face token", 2),
    "ghp_" + "a1" * 18: ("a GitHub token", 2),
    "-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END": ("a private key", 2),
    "correct-horse9": ("a password", 2),
    "5500 0000 0000 0004": ("a card number", 1.5),
    "GB82 WEST 1234 5698 7654 32": ("an IBAN", 1.5),
    "378282246310005": ("a card number", 1.5),
    "4222222222222": ("a card number", 1.5),
    "219-09-9999": ("a US social security number", 1.5),
    "ann.smith@example.org": ("an e-mail address", 0.5),
    "+49 30 1234 5678": ("a telephone number", 0.5),
    "10.20.30.40": ("an IP address", 0.5),
}


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_never_shown(secret: str) -> None:
    kind, score = SECRETS[secret]
    lead = "password: " if kind == "a password" else "Mine is "
    finding = found("secrets", f"{lead}{secret} now")
    assert finding.score == score and kind in finding.reason
    assert f"{secret[:2]}…({len(secret)} characters)" in finding.reason
    for part in secret.split():
        assert len(part) < 4 or part not in finding.reason


@pytest.mark.parametrize("after", [".", "., ", " 12/27", " 737", ", and", ")", ":", "-"])
@pytest.mark.parametrize("secret", ["5500 0000 0000 0004", "378282246310005", "10.20.30.40"])
def test_secrets_are_found_whatever_follows(secret: str, after: str) -> None:
    for before in ("", "Mine is ", "no.", "it:"):
        if not (before == "no." and secret.startswith("10.")):
            [one] = secrets_in(f"{before}{secret}{after}")
            assert one.text == secret


@pytest.mark.parametrize(
    "text",
    [
        "5500 0000 0000 0005 is no card, nor is 0000 0000 0000 0000",
        "1711950000001 is a time, 9780300000047 a book, 356938030000005 a telephone",
        "posts 1712345678000000006 and 912345678900000004",
        "000-00-0000, 666-12-3456, 912-34-5678, 123-00-4567 and 123-45-0000",
        "GB82 WEST 1234 5698 7654 33",
        "version 10.20.30.400 of 2024-05-01",
        "version 10.20.30.40.50 and section 1.2.3.4.5",
        "in 1999-2004 there were 1234567 of them",
        "the password is secret",
        "a task-based risk-averse approach_with_underscores",
        "3.14159265358979 and 12:30:45",
    ],
)
def test_ordinary_numbers_and_words_are_no_secrets(text: str) -> None:
    assert not found("secrets", text).score


def test_of_many_secrets_some_are_marked() -> None:
    addresses = [f"person{n}.name{n}@company{n}.com" for n in range(2000)]
    finding = found("secrets", ", ".join(addresses))
    assert finding.marks == tuple(addresses[:20])
    hidden = masked(", ".join(addresses), list(secrets_in(", ".join(addresses))))
    assert "person" not in hidden and "company1999" not in hidden


def test_masking_removes_every_part() -> None:
    text = f"mail ann.smith@example.org or {KEY}; smith said so"
    hidden = masked(text, list(secrets_in(text)))
    assert KEY not in hidden and KEY[8:] not in hidden
    assert "example" not in hidden and "smith" not in hidden and "said so" in hidden


def test_every_part_of_a_conversation_is_read() -> None:
    bad = "<|im_start|>"
    rows = [
        Row("a", "hi", system=bad, answer="a"),
        Row("b", "hi", history=(Message("user", bad),), answer="a"),
        Row("c", bad, answer="a"),
        Row("d", "hi", answer=bad),
        Row("e", "hi", answer="a", better=("a",), worse=(bad,)),
    ]
    reasons = [one.reason for one in build("scanners", "control-tokens").scan(rows)]
    places = ("system prompt", "user turn 1", "instruction", "answer", "worse answer")
    assert reasons == [f"“{bad}” is in the {place}" for place in places]
