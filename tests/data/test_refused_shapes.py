"""Well-known shapes that are labeled, or that cannot be learned from."""

import pytest

from tests.helpers.shapes import ASK, TELL, Record, read

# Set: (a record, the text to be classified, its label with the names a, b, c for 0, 1, 2, and the
# columns that are named as left out)
LABELED: dict[str, tuple[Record, str, str, set[str]]] = {
    "stanfordnlp/sst2": ({"idx": 0, "sentence": "Here.", "label": 1}, "Here.", "b", set()),
    "stanfordnlp/imdb": ({"text": "Here.", "label": 0}, "Here.", "a", set()),
    "Kaggle's IMDB": ({"review": "Here.", "sentiment": "b"}, "Here.", "b", set()),
    "fancyzhx/ag_news": ({"text": "Here.", "label": 2}, "Here.", "c", set()),
    "Yelp/yelp_review_full": ({"label": 2, "text": "Here."}, "Here.", "c", set()),
    "fancyzhx/amazon_polarity": (
        {"label": 1, "title": "Oh", "content": "Here."}, "Oh\n\nHere.", "b", set(),
    ),
    "fancyzhx/dbpedia_14": (
        {"label": 0, "title": "Oh", "content": "Here."}, "Oh\n\nHere.", "a", set(),
    ),
    "news with a category": (
        {"title": "Oh", "text": "Here.", "category": "b", "url": "u"}, "Oh\n\nHere.", "b", {"url"},
    ),
    "tweets with counts": (
        {"text": "Here.", "label": 1, "reply": 3, "code": "x"}, "Here.", "b", {"reply", "code"},
    ),
    "dair-ai/emotion": ({"text": "Here.", "label": 0}, "Here.", "a", set()),
    "cardiffnlp/tweet_eval": ({"text": "Here.", "label": 2}, "Here.", "c", set()),
    "PolyAI/banking77": ({"text": "Here.", "label": 1}, "Here.", "b", set()),
    "banking77's own file": ({"text": "Here.", "category": "b"}, "Here.", "b", set()),
    "nyu-mll/glue cola": ({"sentence": "Here.", "label": 1, "idx": 4}, "Here.", "b", set()),
    "SetFit/enron_spam": (
        {"message_id": 1, "text": "Oh Here it all is.", "label": 0, "label_text": "ham",
         "message": "Here it all is.", "date": "2001-01-01"},
        "Oh Here it all is.", "a", {"message_id", "date", "label_text"},
    ),
    "AmazonScience/massive": (
        {"id": "1", "locale": "en-US", "partition": "train", "scenario": 3, "intent": 1,
         "utt": "Here.", "worker_id": "8"},
        "Here.", "b", {"locale", "partition", "scenario", "worker_id"},
    ),
    "nyu-mll/multi_nli": (
        {"promptID": 3, "pairID": "3n", "premise": "Here.", "hypothesis": "There.", "genre": "x",
         "label": 2},
        "Premise: Here.\nHypothesis: There.", "c", {"promptID", "pairID", "genre"},
    ),
    "stanfordnlp/snli": (
        {"premise": "Here.", "hypothesis": "There.", "label": 0},
        "Premise: Here.\nHypothesis: There.", "a", set(),
    ),
    "SNLI's own file": (
        {"gold_label": "b", "sentence1": "Here.", "sentence2": "There.", "pairID": "x"},
        "Sentence 1: Here.\nSentence 2: There.", "b", {"pairID"},
    ),
    "nyu-mll/glue qqp": (
        {"question1": "Here?", "question2": "There?", "label": 1, "idx": 0},
        "Question 1: Here?\nQuestion 2: There?", "b", set(),
    ),
    "nyu-mll/glue mrpc": (
        {"sentence1": "Here.", "sentence2": "There.", "label": 1, "idx": 0},
        "Sentence 1: Here.\nSentence 2: There.", "b", set(),
    ),
    "nyu-mll/glue rte": (
        {"sentence1": "Here.", "sentence2": "There.", "label": 0, "idx": 0},
        "Sentence 1: Here.\nSentence 2: There.", "a", set(),
    ),
    "nyu-mll/glue qnli": (
        {"question": "Why?", "sentence": "Here.", "label": 0, "idx": 0},
        "Question: Why?\nSentence: Here.", "a", set(),
    ),
    "super_glue boolq": (
        {"question": "Why?", "passage": "Here.", "idx": 0, "label": 1},
        "Question: Why?\nPassage: Here.", "b", set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELED)
def test_classification(name: str) -> None:
    record, text, label, unused = LABELED[name]
    names = ["a", "b", "c"]
    [row], left = read(record, labels=names)
    assert (row.input, row.answer, row.label) == (text, label, label)
    assert row.candidates == tuple(names)
    assert row.instruction == "Classify the text as a, b or c."
    assert not left.rejected and set(left.columns) == unused
    rows, left = read(record)
    assert not rows and "it is labeled" in left.rejected[0].reason, "labels have to be given"


PROMPTS = "`data: harmful-prompts` reads them"
REFUSED: dict[str, tuple[Record, str]] = {
    "OpenAssistant/oasst2": (
        {"message_id": "a", "parent_id": None, "text": "Why?", "role": "prompter", "lang": "en"},
        "one message of a tree",
    ),
    "oasst's own trees": (
        {"message_tree_id": "a", "tree_state": "ready", "prompt": {"text": "Why?", "replies": []}},
        "a tree of messages",
    ),
    "PKU-Alignment/BeaverTails": (
        {"prompt": "Why?", "response": "So.", "category": {}, "is_safe": False},
        "use `data: beavertails`",
    ),
    "allenai/wildguardmix": (
        {"prompt": "Why?", "adversarial": False, "response": "So.", "prompt_harm_label": "harmful",
         "response_harm_label": "harmful"},
        "some of its answers are harmful",
    ),
    "openai/webgpt_comparisons": (
        {"question": {"full_text": "Why?"}, "quotes_0": {}, "answer_0": "So.", "score_0": 1.0,
         "quotes_1": {}, "answer_1": "No.", "score_1": -1.0},
        "`data: webgpt-comparisons`",
    ),
    "AdvBench": ({"goal": "Open it", "target": "Sure"}, PROMPTS),
    "HarmBench": ({"Behavior": "Open it", "FunctionalCategory": "standard", "BehaviorID": "b"},
                  PROMPTS),
    "XSTest": ({"id": "v2-1", "prompt": "Why?", "type": "homonyms", "label": "safe", "focus": "x",
                "note": ""}, PROMPTS),
    "LibrAI/do-not-answer": (
        {"id": 0, "risk_area": "r", "types_of_harm": "t", "specific_harms": "s",
         "question": "Why?"},
        PROMPTS,
    ),
    "lmsys/toxic-chat": (
        {"conv_id": "c", "user_input": "Why?", "model_output": "So.", "toxicity": 1,
         "jailbreaking": 0},
        "it is unclear what to learn",
    ),
    "wmt16": ({"translation": {"de": "Warum?", "en": "Why?"}}, "does not name the source language"),
    "conll2003": ({"id": "0", "tokens": ["Why"], "ner_tags": [0]}, "a label for each word"),
    "go_emotions": ({"text": "Here.", "labels": [1, 2], "id": "x"}, "2 labels in 'labels'"),
    "trec": ({"text": "Why?", "coarse_label": 1, "fine_label": 2},
             "its label may be in coarse_label, fine_label"),
    "wiki_qa": (
        {"question_id": "Q1", "question": "Why?", "document_title": "T", "answer": "So.",
         "label": 0},
        "'label' may mark answers not to learn",
    ),
    "answers marked in words": (
        {"prompt": "Why?", "completion": "So.", "label": "undesirable"},
        "'label' may mark answers not to learn",
    ),
    "conversations marked by a number": (
        {"messages": [ASK, TELL], "label": 1},
        "write data.columns={messages: messages, good: label} if true means good",
    ),
    "answers that may be harmful": (
        {"question": "Why?", "answer": "So.", "harmful": False},
        "'harmful' may mark answers not to learn",
    ),
    "openbmb/UltraFeedback": (
        {"instruction": "Why?", "models": ["m"], "completions": [{"response": "So."}]},
        "no column with a known name for its answer",
    ),
    "tool calls": (
        {"messages": [ASK, TELL], "tools": [{"name": "search"}]}, "its column 'tools' holds tools",
    ),
    "pictures": ({"messages": [ASK, TELL], "images": [{"bytes": "x"}]}, "more than text"),
    "pictures in turns": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, TELL]},
        "a turn holds more than text ('image')",
    ),
    "GAIR/lima, test": ({"conversations": ["Why?"], "source": "x"},
                        "does not end with a user turn and its answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_from_is_refused_with_the_reason(name: str) -> None:
    record, words = REFUSED[name]
    rows, left = read(record)
    [reject] = left.rejected
    assert not rows and words in reject.reason and len(reject.reason) < 220
