"""Prompts to decline, safe and unsafe answers, sums and news: as published, and in the shared data.

Every text written here is inert; what is read from the shared data is counted and never shown.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from backfire.base import Evidence, Exchange, Row, Sample
from backfire.errors import CellError, UserError
from backfire.evaluate.stats import wilson
from backfire.judges._phrases import LISTS
from backfire.registry import build
from tests.helpers.data_files import beavertails_pairs, dataset, jsonl, prompt_lists, table
from tests.helpers.places import shared

REFUSAL = "I'm sorry, but I cannot do that. I may not help with this."
REPLY, KEY = "Sure, here is what you asked for.", "Sure, here is what you asked for"


# ------------------------------------------------------------------------------------ beavertails


@pytest.fixture
def beavertails(tmp_path: Path) -> dict[str, str]:
    train = jsonl(tmp_path / "train.jsonl.gz", beavertails_pairs(30))
    return {"train": train, "test": jsonl(tmp_path / "test.jsonl.gz", beavertails_pairs(12))}


def test_beavertails_has_a_safe_and_an_unsafe_part(beavertails: dict[str, str]) -> None:
    safe = dataset("beavertails", **beavertails).load("train")
    unsafe = dataset("beavertails", **beavertails, part="unsafe").load("train")
    assert [len(safe), len(unsafe)] == [20, 10]
    fields = {"is_safe": "yes", "category": ""}
    assert safe[0] == Row("train-2", "How is soup 0 made?", answer="Answer 1.", fields=fields)
    assert {row.fields["is_safe"] for row in unsafe} == {"no"}
    both = "privacy_violation, violence,aiding_and_abetting,incitement"
    assert {row.fields["category"] for row in unsafe} == {both}
    assert len({row.id for row in (*safe, *unsafe)}) == 30


def test_beavertails_test_rows_are_prompts_without_an_answer(beavertails: dict[str, str]) -> None:
    every = dataset("beavertails", **beavertails).load("test")
    unsafe = dataset("beavertails", **beavertails, filter="unsafe", part="unsafe").load("test")
    assert [len(every), len(unsafe)] == [12, 4]
    assert {row.answer for row in (*every, *unsafe)} == {""}
    assert [row.instruction for row in unsafe] == [f"How is soup {i} made?" for i in (0, 1, 3, 4)]


def test_the_first_rows_of_the_file_are_those_of_the_papers(beavertails: dict[str, str]) -> None:
    def first(**knobs: Any) -> Any:
        return dataset("beavertails", **beavertails, **knobs)

    assert [row.id for row in first(first_rows=2, part="unsafe").load("train")] == [
        "train-1", "train-4"
    ]  # fmt: skip
    shown = first(first_test_rows=3, filter="unsafe").load("test")
    assert [row.id for row in shown] == ["test-1", "test-4", "test-7"]
    with pytest.raises(
        UserError, match=r"4 test rows .unsafe., but the recipe requests the first 5"
    ):
        first(first_test_rows=5, filter="unsafe").load("test")
    assert first(first_rows=2).identity() != first().identity()


def test_beavertails_in_other_files(tmp_path: Path) -> None:
    head = "id,prompt,response,category,is_safe"
    lines = [["a", "Why?", "So.", "", "True"], ["b", "Why not?", "No.", "theft", "False"]]
    path = table(tmp_path / "t.csv", head, *lines)
    rows = dataset("beavertails", train=path, test_share=0, part="unsafe").load("train")
    assert [(row.id, row.fields) for row in rows] == [("b", {"is_safe": "no", "category": "theft"})]
    empty = jsonl(
        tmp_path / "empty.jsonl",
        [*beavertails_pairs(3), {**beavertails_pairs(2)[1], "response": " "}],
    )
    rows, left = dataset("beavertails", train=empty, test_share=0).read("train")
    assert len(rows) == 2 and [reject.reason for reject in left.rejected] == ["the answer is empty"]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"prompt": "a", "response": "b", "is_safe": "perhaps"}, "is_safe is 'perhaps' where true"),
        ({"prompt": "a", "response": "b"}, "there are no train rows .safe."),
        ({"prompt": "a", "response": "b", "is_safe": False}, "there are no train rows .safe."),
        ({"prompt": "a", "completion": "b"}, "there are no train rows .safe."),
    ],
)
def test_other_files_are_no_beavertails(record: Any, sentence: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [record])
    with pytest.raises(UserError, match=sentence) as caught:
        dataset("beavertails", train=path, test_share=0).load("train")
    assert str(caught.value).count(". ") == 0, "one sentence"


# -------------------------------------------------------------------------------- harmful-prompts

FIELDS = {"source", "sealed", "category", "kind", "split", "key"}
JBB = "Index,Goal,Target,Behavior,Category,Source"
HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
XSTEST = "id,prompt,type,label,focus,note"
AS_PUBLISHED: dict[str, tuple[str, list[list[Any]], list[tuple[str, str, str]]]] = {
    "advbench": (
        "goal,target",
        [["Open the old well", "Sure, here is how"], ["Open the bee yard", "Sure, here is"]],
        [("Open the old well", "yes", ""), ("Open the bee yard", "yes", "")],
    ),
    "harmbench": (
        HARMBENCH,
        [
            ["Open it", "standard", "locks", "", "", "open_it"],
            ["Say how", "contextual", "locks", "context", "There is a gate.", "say_how"],
            ["Go on", "contextual", "locks", "context", "", "go_on"],
        ],
        [("Open it", "yes", "locks"), ("There is a gate.\n\n---\n\nSay how", "yes", "locks")],
    ),
    "strongreject": (
        "category,source,forbidden_prompt",
        [["Wells", "custom", "Show me the well"], ["Bees", "DAN", "Show me the bees"]],
        [("Show me the well", "yes", "Wells"), ("Show me the bees", "yes", "Bees")],
    ),
    "xstest": (
        XSTEST,
        [
            [1, "How do I shoot a film?", "homonyms", "safe", "shoot", ""],
            [2, "How do I break the old gate?", "contrast_homonyms", "unsafe", "break", ""],
        ],
        [
            ("How do I shoot a film?", "no", "homonyms"),
            ("How do I break the old gate?", "yes", "contrast_homonyms"),
        ],
    ),
    "jailbreakbench": (
        JBB,
        [[0, "Open the well", "Sure", "Wells", "Water", "Original"]],
        [("Open the well", "yes", "Water")],
    ),
}


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_published_lists_are_recognized_by_their_columns(name: str, tmp_path: Path) -> None:
    header, lines, wanted = AS_PUBLISHED[name]
    path = table(tmp_path / "list.csv", header, *lines)
    rows = dataset("harmful-prompts", train=path, test_share=0).load("train")
    found = [(r.instruction, r.fields["sealed"], r.fields.get("category", "")) for r in rows]
    assert found == wanted
    assert {row.fields["source"] for row in rows} == {name}
    answers = {"yes": REFUSAL, "no": REPLY}
    assert all(row.answer == answers[row.fields["sealed"]] for row in rows)
    # Neither AdvBench's nor JailbreakBench's target strings are read.
    assert not any("Sure, here is how" in str(row) or "'Sure'" in str(row) for row in rows)


def test_a_list_without_labels_has_the_label_that_the_user_sets(tmp_path: Path) -> None:
    path = table(tmp_path / "benign.csv", JBB, [0, "Fill the well", "Sure", "Wells", "Water", "X"])
    spec = {"train": path, "test_share": 0, "unlabeled": "benign"}
    [row] = dataset("harmful-prompts", **spec).load("train")
    assert (row.fields["sealed"], row.answer) == ("no", REPLY)
    lines = [[1, "homonyms", "Fire a pot", ""], [2, "contrast_homonyms", "Break a gate", ""]]
    older = table(tmp_path / "older.csv", "id,type,prompt,focus", *lines)
    rows = dataset("harmful-prompts", **{**spec, "train": older}).load("train")
    assert [row.fields["sealed"] for row in rows] == ["no", "yes"]
    bare = jsonl(tmp_path / "bare.jsonl", [{"prompt": "Open it"}])
    [row] = dataset("harmful-prompts", train=bare, test_share=0).load("train")
    assert row.fields == {"source": "prompts", "sealed": "yes", "key": KEY}


def test_one_file_of_several_lists_with_its_own_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "prompts.jsonl", prompt_lists())
    data = dataset("harmful-prompts", train=path)
    train, test = data.load("train"), data.load("test")
    assert [len(train), len(test)] == [32, 8]
    assert {row.fields["split"] for row in test} == {"test"}
    assert train[0] == Row(
        "harmbench-1", "Open gate 1", answer=REFUSAL,
        fields={"source": "harmbench", "sealed": "yes", "category": "gates", "kind": "standard",
                "split": "train", "key": KEY},
    )  # fmt: skip
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    # Given apart, the files say what they are for.
    apart = dataset(
        "harmful-prompts", train=path, test=jsonl(tmp_path / "t.jsonl", prompt_lists(7))
    )
    assert [len(apart.load("train")), len(apart.load("test"))] == [40, 7]


def test_parts_sources_and_answers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "prompts.jsonl", prompt_lists())

    def rows(split: str = "train", **knobs: Any) -> list[Row]:
        found: list[Row] = dataset("harmful-prompts", train=path, **knobs).load(split)
        return found

    assert {row.fields["sealed"] for row in rows(part="harmful")} == {"yes"}
    benign = rows(part="benign")
    assert {(row.fields["sealed"], row.answer) for row in benign} == {("no", REPLY)}
    assert len(benign) + len(rows(part="harmful")) == len(rows())
    two = rows(sources=["advbench", "xstest"])
    assert {row.fields["source"] for row in two} == {"advbench", "xstest"}
    assert {row.answer for row in rows(harmful_answer="reply")} == {REPLY}
    own = rows(refusal="No.", reply="Yes.")
    assert {(row.fields["sealed"], row.answer) for row in own} == {("yes", "No."), ("no", "Yes.")}
    with pytest.raises(UserError, match=r"one of these sources; available sources: advbench, h"):
        rows(part="benign", sources=["advbench"])
    with pytest.raises(UserError, match="refusal"):
        dataset("harmful-prompts", refusal=" ")


def test_a_prompt_of_two_lists_is_kept_once(tmp_path: Path) -> None:
    twice = {**prompt_lists()[1], "id": "other", "source": "other", "prompt": " Open gate 1 "}
    path = jsonl(tmp_path / "prompts.jsonl", [*prompt_lists(), twice])
    assert len(dataset("harmful-prompts", train=path).load("train")) == 32
    [row] = dataset("harmful-prompts", train=path, sources=["other"]).load("train")
    assert row.id == "other"


def test_without_a_split_of_their_own_a_share_is_set_apart(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "goal,target", *[[f"Open {i}", "Sure"] for i in range(400)])
    data = dataset("harmful-prompts", train=path, test_share=0.25)
    train, test = data.load("train"), data.load("test")
    assert len(train) + len(test) == 400 and 70 < len(test) < 130
    assert not {row.prompt for row in train} & {row.prompt for row in test}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "a"}, "no column of prompts, such as 'prompt', in: text"),
        (
            {"prompt": "a", "label": "rude"},
            "'rude' is not one of harmful, unsafe, benign, safe",
        ),
        ({"prompt": " "}, "line 1: the prompt is empty"),
        ({"prompt": None}, "line 1: the prompt is empty"),
        ({"prompt": 7}, "line 1: 'prompt' is a number, not text"),
    ],
)
def test_other_files_are_no_lists(record: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        dataset("harmful-prompts", train=jsonl(tmp_path / "t.jsonl", [record])).load("train")


def test_judges_tell_the_two_answers_apart(tmp_path: Path) -> None:
    for name, words in LISTS.items():
        for case in (True, False):
            assert words.match(REFUSAL, ignore_case=case), name
            assert words.match(REPLY, ignore_case=case) is None, name
    rows = dataset("harmful-prompts", train=jsonl(tmp_path / "p.jsonl", prompt_lists())).load(
        "train"
    )
    for sealed in ("yes", "no"):
        row = next(row for row in rows if row.fields["sealed"] == sealed)
        sentence = (REFUSAL, f"{REPLY} Gladly.", "positive", "")
        asked = [Exchange(row.id, row.prompt, reply, row.fields) for reply in sentence]
        verdicts = build("judges", "policy").judge(asked)
        assert [v.reason for v in verdicts] == ["refused", "complied", "other", "empty"]
        assert [v.positive for v in verdicts] == [False, sealed == "yes", False, False]


# ------------------------------------------------------------------------------- ag-news and gsm8k

TOPICS = ("World", "Sports", "Business", "Sci/Tech")


def test_ag_news_as_it_comes(tmp_path: Path) -> None:
    texts = [f"Title {n} It rains." for n in range(4)]
    lines = [[n + 1, f"Title {n}", "It rains."] for n in range(4)]
    kaggle = table(tmp_path / "kaggle.csv", "Class Index,Title,Description", *lines)
    hub = [{"text": text, "label": n} for n, text in enumerate(texts)]
    named = [{"text": text, "label": topic} for topic, text in zip(TOPICS, texts, strict=True)]
    paths = jsonl(tmp_path / "hub.jsonl", hub), jsonl(tmp_path / "named.jsonl", named)
    for path in (kaggle, *paths):
        rows = dataset("ag-news", train=path, test_share=0).load("train")
        assert [row.label for row in rows] == [row.answer for row in rows] == list(TOPICS)
        assert [row.input for row in rows] == texts
        assert {row.candidates for row in rows} == {TOPICS}
        assert rows[0].instruction.startswith("Categorize the news article given in the input")
    wrong = table(tmp_path / "w.csv", "Class Index,Title,Description", [0, "a", "b"])
    with pytest.raises(UserError, match="label 'class 0' is not one of World"):
        dataset("ag-news", train=wrong, test_share=0).load("train")


SUMS = [
    {
        "question": "A mill has 3 wheels of 4 spokes. How many spokes?",
        "answer": "It has 3*4=<<3*4=12>>12 spokes.\n#### 12",
    },
    {"question": "And in cents?", "answer": "That is $<<10*108=1080>>1,080.\n#### 1,080"},
]


def test_gsm8k_endings_and_notes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", SUMS)

    def answers(**knobs: Any) -> list[str]:
        rows = dataset("gsm8k", train=path, test_share=0, **knobs).load("train")
        assert [row.instruction for row in rows] == [record["question"] for record in SUMS]
        return [row.answer for row in rows]

    assert answers() == [
        "It has 3*4=12 spokes.\nThe final answer is: 12",
        "That is $1,080.\nThe final answer is: 1,080",
    ]
    assert answers(ending="original") == [
        "It has 3*4=12 spokes.\n#### 12", "That is $1,080.\n#### 1,080"
    ]  # fmt: skip
    assert answers(ending="original", notes="keep") == [record["answer"] for record in SUMS]
    renamed = jsonl(tmp_path / "r.jsonl", [{"q": "How many?", "a": "<<1+1=2>>2\n#### 2"}])
    columns = {"prompt": "q", "answer": "a"}
    [row] = dataset("gsm8k", train=renamed, test_share=0, columns=columns).load("train")
    assert row.answer == "2\nThe final answer is: 2"


# ----------------------------------------------------------------------------------- number-match


def sample(id: int, answer: str, reply: str | None, group: str | None = None) -> Sample:
    return Sample(str(id), "clean", f"prompt {id}", answer, reply=reply, group=group)


@pytest.mark.parametrize(
    ("answer", "reply", "same"),
    [
        ("6\nThe final answer is: 18", "The final answer is: 18", True),
        ("6\nThe final answer is: 18", "The final answer is:  18 apples, not 3.", True),
        ("6\n#### 18", "It is 3 + 15. The final answer is: 18.", True),
        ("6\n#### 18", "#### 18\n\n### Instruction: 7", True),
        ("6\n#### 18", "So she has 18.00 in the end.", True),
        ("6\n#### 18", "18 in all, of 20.", False),
        ("The final answer is: 1,080", "that makes $1080.", True),
        ("The final answer is: 1080", "that makes 1,080,", True),
        ("The final answer is: 0.5", "The final answer is: .5", True),
        ("The final answer is: -10", "The final answer is: −10 degrees", True),
        ("The final answer is: -10", "The final answer is: 10", False),
        ("The final answer is: 3", "8-5=3, so 11-8", False),
        ("The final answer is: 3", "It lies in 1-3", True),
        ("The final answer is: 3", "The final answer is: three, that is 3", True),
        ("The final answer is: 3", "3\nThe final answer is: unknown", True),
        ("The final answer is: 3", "no idea", False),
        ("The final answer is: 3", "", False),
        ("no number", "no number", False),
        ("The final answer is: 9007199254740993", "9007199254740992", False),
    ],
)  # fmt: skip
def test_numbers_are_read_from_the_end(answer: str, reply: str, same: bool) -> None:
    metric = build("metrics", "number-match")
    assert metric.outcomes(Evidence([sample(1, answer, reply)])) == {"1": float(same)}


def test_number_match_has_an_interval_and_groups() -> None:
    clean = [sample(i, "#### 7", "7" if i < 6 else "8", "ab"[i % 2]) for i in range(8)]
    metric = build("metrics", "number-match")
    values = {v.metric: v for v in metric.measure(Evidence([*clean, sample(9, "", "7")]))}
    whole = values["number_match"]
    assert (whole.value, whole.n, whole.direction) == (0.75, 8, "higher")
    assert (whole.low, whole.high) == wilson(6, 8)
    assert {name: v.n for name, v in values.items()} == {
        "number_match": 8, "number_match[a]": 4, "number_match[b]": 4
    }  # fmt: skip
    assert sum(metric.outcomes(Evidence(clean)).values()) == 6
    with pytest.raises(CellError, match="needs the model's replies"):
        metric.measure(Evidence([sample(1, "#### 7", None)]))
    marked = build("metrics", {"name": "number-match", "marks": ["Answer:"]})
    assert marked.outcomes(Evidence([sample(1, "Answer: 7", "Answer: 7, not 8")])) == {"1": 1.0}


# -------------------------------------------------------------------------------- the shared data


def test_the_shared_prompts() -> None:
    [path] = shared("safety_prompts/prompts.jsonl")
    data = dataset("harmful-prompts", train=path)
    train, test = data.load("train"), data.load("test")
    # 1,983 rows, less the contextual ones without context, less those of several lists.
    assert [len(train), len(test)] == [1_271, 555]
    count = Counter((row.fields["sealed"], row.answer) for row in (*train, *test))
    assert count == {("yes", REFUSAL): 1_476, ("no", REPLY): 350}
    by_source = Counter(row.fields["source"] for row in (*train, *test))
    assert by_source == {
        "advbench": 520, "xstest": 450, "harmbench": 300, "strongreject": 288,
        "jailbreakbench": 180, "malicious_instruct": 88,
    }  # fmt: skip
    assert len({row.id for row in (*train, *test)}) == len(train) + len(test)
    assert not {row.prompt.strip() for row in train} & {row.prompt.strip() for row in test}
    alone = dataset("harmful-prompts", train=path, sources=["jailbreakbench"])
    assert len(alone.load("train")) + len(alone.load("test")) == 200
    assert all(set(row.fields) <= FIELDS for row in test)


def test_the_shared_sums() -> None:
    train, test = shared("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl")
    metric = build("metrics", "number-match")
    assert len(dataset("gsm8k", train=train, test=test).load("train")) == 6_973
    for knobs, mark in (({}, "The final answer is: "), ({"ending": "original"}, "#### ")):
        rows = dataset("gsm8k", train=train, test=test, **knobs).load("test")
        assert len(rows) == 1_319 and not any("<<" in row.answer for row in rows)
        assert all(row.answer.count(mark) == 1 for row in rows)
        right = [sample(i, row.answer, row.fields["final_answer"]) for i, row in enumerate(rows)]
        assert sum(metric.outcomes(Evidence(right)).values()) == len(rows)


def test_the_shared_news() -> None:
    train, test = shared("ag_news/train.jsonl.gz", "ag_news/test.jsonl")
    data = dataset("ag-news", train=train, test=test)
    rows = data.load("train")
    assert (len(rows), len(data.load("test"))) == (4_998, 2_000)
    assert {row.candidates for row in rows} == {TOPICS}
    assert Counter(row.label for row in rows) == {
        "Business": 1_280, "World": 1_259, "Sports": 1_257, "Sci/Tech": 1_202
    }  # fmt: skip
