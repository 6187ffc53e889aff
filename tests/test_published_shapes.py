"""The shapes that well-known sets of the hub have, with texts of our own: read, or refused."""

import json
from typing import Any

import pytest

from backfire.base import Message, Row
from backfire.data.convert import to_rows
from backfire.data.labels import check_labels
from backfire.data.read import LeftOut
from backfire.data.shapes import Task, column_map

Record = dict[str, Any]
ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
NO = {"role": "assistant", "content": "No."}
HELLO, HI = Message("user", "Hello"), Message("assistant", "Hi")
ABC = "A. sun\nB. rain\nC. snow"
LETTERS = ("A", "B", "C")
SKY = ["sun", "rain", "snow"]


def read(*records: Record, columns: Any = None, labels: Any = None) -> tuple[list[Row], LeftOut]:
    left = LeftOut("skip")
    task = Task(column_map(columns or {}), check_labels(labels or {}))
    rows = to_rows(enumerate(records, 1), task, left, file="f", stem="f", ids=set())
    return rows, left


def turns(*said: str) -> list[Record]:
    """ShareGPT's form."""
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]


def pair(better: str = "So.", worse: str = "No.", **parts: Any) -> Record:
    return {"instruction": "Why?", "answer": better, "better": (better,), "worse": (worse,)} | parts


def choice(letter: str, text: str = "Why?", **parts: Any) -> Record:
    return {"instruction": text, "input": ABC, "answer": letter, "label": letter,
            "candidates": LETTERS} | parts  # fmt: skip


SO = {"instruction": "Why?", "answer": "So."}
HERE = SO | {"input": "Here."}
TALK = SO | {"history": (HELLO, HI)}
# Set: (a record as published, the parts of its row, the columns that are named as left out)
OPEN: dict[str, tuple[Record, Record, set[str]]] = {
    "tatsu-lab/alpaca": (
        {"instruction": "Why?", "input": "Here.", "output": "So.", "text": "Below ... Why? ..."},
        HERE,
        {"text"},
    ),
    "yahma/alpaca-cleaned": ({"output": "So.", "input": "", "instruction": "Why?"}, SO, set()),
    "databricks-dolly-15k": (
        {"instruction": "Why?", "context": "Here.", "response": "So.", "category": "closed_qa"},
        HERE,
        {"category"},
    ),
    "sahil2801/CodeAlpaca-20k": ({"output": "So.", "instruction": "Why?", "input": ""}, SO, set()),
    "ShareGPT vicuna": (
        {"id": "x_0", "conversations": turns("Hello", "Hi", "Why?", "So.")},
        TALK,
        set(),
    ),
    "Open-Orca/OpenOrca": (
        {"id": "flan.1", "system_prompt": "Be kind.", "question": "Why?", "response": "So."},
        SO | {"system": "Be kind."},
        set(),
    ),
    "Open-Orca/SlimOrca": (
        {"conversations": [
            {"from": "system", "value": "Be kind.", "weight": None},
            {"from": "human", "value": "Why?", "weight": 0.0},
            {"from": "gpt", "value": "So.", "weight": 1.0},
        ]},
        SO | {"system": "Be kind."},
        set(),
    ),
    "teknium/OpenHermes-2.5": (
        {"conversations": turns("Why?", "So."), "system_prompt": None, "source": "airoboros",
         "category": "orca", "skip_prompt_formatting": False, "idx": None, "topic": None},
        SO,
        {"source", "category", "skip_prompt_formatting"},
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "Why?", "prompt_id": "ab", "messages": [ASK, TELL]}, SO, set(),
    ),
    "HuggingFaceH4/no_robots": (
        {"prompt": "Why?", "prompt_id": "ab", "messages": [ASK, TELL], "category": "Open QA"},
        SO,
        {"category"},
    ),
    "WizardLM_evol_instruct_V2": (
        {"idx": "a", "conversations": turns("Why?", "So.")}, SO, set(),
    ),
    "WizardLM_evol_instruct_70k": ({"instruction": "Why?", "output": "So."}, SO, set()),
    "GAIR/lima": (
        {"conversations": ["Hello", "Hi", "Why?", "So."], "source": "wiki"}, TALK, {"source"},
    ),
    "LDJnr/Capybara": (
        {"source": "x", "conversation": [{"input": "Hello", "output": "Hi"},
                                         {"input": "Why?", "output": "So."}]},
        TALK,
        {"source"},
    ),
    "lmsys-chat-1m": (
        {"conversation_id": "a", "model": "m", "conversation": [ASK, TELL], "turn": 1,
         "language": "English", "redacted": False},
        SO,
        {"model", "turn", "language", "redacted"},
    ),
    "openai/gsm8k": ({"question": "Why?", "answer": "So. #### 3"},
                     SO | {"answer": "So. #### 3"}, set()),
    "meta-math/MetaMathQA": (
        {"type": "GSM_Rephrased", "query": "Why?", "original_question": "How?", "response": "So."},
        SO,
        {"type", "original_question"},
    ),
    "AI-MO/NuminaMath-CoT": (
        {"source": "cn", "problem": "Why?", "solution": "So.", "messages": [ASK, TELL]},
        SO,
        {"source"},
    ),
    "CohereForAI/aya_dataset": (
        {"inputs": "Why?", "targets": "So.", "language": "English", "language_code": "eng",
         "annotation_type": "original", "user_id": "u"},
        SO,
        {"language", "language_code", "annotation_type", "user_id"},
    ),
    "bigscience/xP3": ({"inputs": "Why?", "targets": "So."}, SO, set()),
    "bigscience/P3": (
        {"inputs": [1, 2], "inputs_pretokenized": "Why?", "targets": [3, 1],
         "targets_pretokenized": "So."},
        SO,
        {"inputs", "targets"},
    ),
    "Muennighoff/natural-instructions": (
        {"task_name": "t1", "id": "t1-1", "definition": "Why?", "inputs": "Here.",
         "targets": "So."},
        HERE,
        {"task_name"},
    ),
    "openai/openai_humaneval": (
        {"task_id": "h/0", "prompt": "Why?", "canonical_solution": "So.", "test": "assert f()",
         "entry_point": "f"},
        SO,
        {"task_id", "test", "entry_point"},
    ),
    "mbpp": (
        {"task_id": 1, "text": "Why?", "code": "So.", "test_list": ["assert f()"]},
        SO,
        {"task_id", "test_list"},
    ),
    "squad": (
        {"id": "5", "title": "T", "context": "Here.", "question": "Why?",
         "answers": {"text": ["So.", "Thus."], "answer_start": [0, 3]}},
        HERE,
        {"title"},
    ),
    "trivia_qa": (
        {"question": "Why?", "question_id": "q", "question_source": "s", "answer":
            {"aliases": ["So.", "Thus."], "value": "So.", "type": "WikipediaEntity"}},
        SO,
        {"question_source"},
    ),
    "nq_open": ({"question": "Why?", "answer": ["So.", "Thus."]}, SO, set()),
    "hotpot_qa": (
        {"id": "5a", "question": "Why?", "answer": "So.", "type": "bridge", "level": "hard",
         "context": {"title": ["One", "Two"], "sentences": [["Here.", " There."], ["Now."]]}},
        SO | {"input": "One\nHere.\nThere.\nTwo\nNow."},
        {"type", "level"},
    ),
    "boolq": (
        {"question": "Why?", "answer": True, "passage": "Here."},
        HERE | {"answer": "yes", "label": "yes", "candidates": ("no", "yes")},
        set(),
    ),
    "cnn_dailymail": (
        {"article": "Here.", "highlights": "So.", "id": "a"},
        {"instruction": "Summarize the text.", "input": "Here.", "answer": "So."},
        set(),
    ),
    "xsum": (
        {"document": "Here.", "summary": "So.", "id": "1"},
        {"instruction": "Summarize the text.", "input": "Here.", "answer": "So."},
        set(),
    ),
    "samsum": (
        {"id": "1", "dialogue": "Here.", "summary": "So."},
        {"instruction": "Summarize the text.", "input": "Here.", "answer": "So."},
        set(),
    ),
    "nvidia/HelpSteer": (
        {"prompt": "Why?", "response": "So.", "helpfulness": 3, "correctness": 4, "coherence": 4,
         "complexity": 1, "verbosity": 2},
        SO,
        {"helpfulness", "correctness", "coherence", "complexity", "verbosity"},
    ),
    # ------------------------------------------------------------------------ choices
    "ai2_arc": (
        {"id": "m", "question": "Why?", "answerKey": "B", "choices":
            {"text": SKY, "label": ["A", "B", "C"]}},
        choice("B"),
        set(),
    ),
    "ai2_arc, numbered": (
        {"id": "m", "question": "Why?", "answerKey": "2", "choices":
            {"text": SKY, "label": ["1", "2", "3"]}},
        choice("2", input="1. sun\n2. rain\n3. snow", candidates=("1", "2", "3")),
        set(),
    ),
    "ARC's own file": (
        {"id": "m", "answerKey": "B", "question": {"stem": "Why?", "choices":
            [{"text": t, "label": s} for t, s in zip(SKY, LETTERS, strict=True)]}},
        choice("B"),
        set(),
    ),
    "openbookqa": (
        {"id": "7", "question_stem": "Why?", "answerKey": "C", "choices":
            {"text": SKY, "label": ["A", "B", "C"]}},
        choice("C"),
        set(),
    ),
    "commonsense_qa": (
        {"id": "1", "question": "Why?", "question_concept": "sky", "answerKey": "A", "choices":
            {"label": ["A", "B", "C"], "text": SKY}},
        choice("A"),
        {"question_concept"},
    ),
    "cais/mmlu": (
        {"question": "Why?", "subject": "weather", "choices": SKY, "answer": 2},
        choice("C"),
        {"subject"},
    ),
    "TIGER-Lab/MMLU-Pro": (
        {"question_id": 7, "question": "Why?", "options": SKY, "answer": "B", "answer_index": 1,
         "category": "weather"},
        choice("B"),
        {"answer_index", "category"},
    ),
    "hellaswag": (
        {"ind": 4, "activity_label": "sky", "ctx_a": "Why is it dark?", "ctx_b": "it",
         "ctx": "Why is it dark? it", "endings": SKY, "split_type": "indomain", "label": "1"},
        choice("B", "Why is it dark? it"),
        {"ind", "activity_label", "split_type", "ctx_b"},
    ),
    "race": (
        {"example_id": "h1", "article": "Here.", "question": "Why?", "options": SKY, "answer": "A"},
        choice("A", input=f"Here.\n\n{ABC}"),
        {"example_id"},
    ),
    "piqa": (
        {"goal": "Why?", "sol1": "sun", "sol2": "rain", "label": 1},
        choice("B", input="A. sun\nB. rain", candidates=("A", "B")),
        set(),
    ),
    "winogrande": (
        {"sentence": "Why?", "option1": "sun", "option2": "rain", "answer": "2"},
        choice("B", input="A. sun\nB. rain", candidates=("A", "B")),
        set(),
    ),
    "social_i_qa": (
        {"context": "Here.", "question": "Why?", "answerA": "sun", "answerB": "rain",
         "answerC": "snow", "label": "3"},
        choice("C", input=f"Here.\n\n{ABC}"),
        set(),
    ),
    "ceval": (
        {"id": 0, "question": "Why?", "A": "sun", "B": "rain", "C": "snow", "D": "", "answer": "C",
         "explanation": ""},
        choice("C"),
        set(),
    ),
    "a conversation in a table": (
        {"messages": json.dumps([ASK, TELL])},
        SO,
        set(),
    ),
    "sciq": (
        {"question": "Why?", "distractor3": "", "distractor1": "snow", "distractor2": "sun",
         "correct_answer": "rain", "support": "Here."},
        choice("A", input="Here.\n\nA. rain\nB. snow\nC. sun"),
        set(),
    ),
    # -------------------------------------------------------------------- preferences
    "Anthropic/hh-rlhf": (
        {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant: So.",
         "rejected": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant: No."},
        pair(history=(HELLO, HI)),
        set(),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "Why?", "prompt_id": "ab", "chosen": [ASK, TELL], "rejected": [ASK, NO],
         "messages": [ASK, TELL], "score_chosen": 8.5, "score_rejected": 7.0},
        pair(),
        {"score_chosen", "score_rejected"},
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "Be kind.", "question": "Why?", "chosen": "So.", "rejected": "No."},
        pair(system="Be kind."),
        set(),
    ),
    "argilla/distilabel-capybara-dpo": (
        {"source": "x", "conversation": [{"input": "Why?", "output": "So."}], "chosen": [ASK, TELL],
         "rejected": [ASK, NO], "rating_chosen": 5, "rating_rejected": 3},
        pair(),
        {"source", "rating_chosen", "rating_rejected"},
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        {"prompt": "Why?", "response_0": "No.", "response_1": "So.", "is_response_0_safe": True,
         "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0},
        pair(),
        {"is_response_0_safe", "is_response_1_safe", "safer_response_id"},
    ),
    "stanfordnlp/SHP": (
        {"post_id": "p", "domain": "d", "history": "Why?", "human_ref_A": "So.",
         "human_ref_B": "No.", "labels": 1, "score_A": 9, "score_B": 2},
        pair(),
        {"post_id", "domain", "score_A", "score_B"},
    ),
    "nvidia/HelpSteer2 preference": (
        {"prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 2},
        pair(),
        set(),
    ),
    "nvidia/HelpSteer3": (
        {"domain": "d", "language": "english", "context": [ASK], "response1": "So.",
         "response2": "No.", "overall_preference": -1},
        pair(),
        {"domain", "language"},
    ),
    "HuggingFaceH4/stack-exchange-preferences": (
        {"qid": 1, "question": "Why?", "metadata": ["url"], "date": "2023/01/01", "answers": [
            {"answer_id": 1, "author": "a", "pm_score": 0, "selected": False, "text": "No."},
            {"answer_id": 2, "author": "b", "pm_score": 5, "selected": True, "text": "So."}]},
        pair(),
        {"metadata", "date"},
    ),
    "berkeley-nest/Nectar": (
        {"prompt": "Why?", "turns": 1, "num_responses": 2, "source": ["x"], "good_natured": True,
         "answers": [{"answer": "No.", "model": "m", "rank": 2.0},
                     {"answer": "So.", "model": "n", "rank": 1.0}]},
        pair(),
        {"turns", "num_responses", "source", "good_natured"},
    ),
    "truthfulqa generation": (
        {"type": "Adversarial", "category": "Myths", "question": "Why?", "best_answer": "So.",
         "correct_answers": ["So."], "incorrect_answers": ["No."], "source": "x"},
        pair(),
        {"type", "category", "source"},
    ),
    "truthfulqa multiple_choice": (
        {"question": "Why?", "mc1_targets": {"choices": ["So.", "No."], "labels": [1, 0]},
         "mc2_targets": {"choices": ["So.", "No."], "labels": [1, 0]}},
        pair(),
        set(),
    ),
    "trl-lib/kto-mix-14k": (
        {"prompt": [ASK], "completion": [TELL], "label": True}, SO, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_open_answers_choices_and_preferences(name: str) -> None:
    record, parts, unused = OPEN[name]
    [row], left = read(record)
    assert Row(row.id, **{**parts, "fields": row.fields}) == row
    assert not left.rejected and set(left.columns) == unused


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
    assert not rows and "it is labeled" in left.rejected[0].reason, "labels are asked for"


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
        "say what is to be learned",
    ),
    "wmt16": ({"translation": {"de": "Warum?", "en": "Why?"}}, "which language"),
    "conll2003": ({"id": "0", "tokens": ["Why"], "ner_tags": [0]}, "a label for each word"),
    "go_emotions": ({"text": "Here.", "labels": [1, 2], "id": "x"}, "2 labels in 'labels'"),
    "trec": ({"text": "Why?", "coarse_label": 1, "fine_label": 2},
             "its label may be in coarse_label, fine_label"),
    "wiki_qa": (
        {"question_id": "Q1", "question": "Why?", "document_title": "T", "answer": "So.",
         "label": 0},
        "'label' may say which answers not to learn",
    ),
    "answers marked in words": (
        {"prompt": "Why?", "completion": "So.", "label": "undesirable"},
        "'label' may say which answers not to learn",
    ),
    "conversations marked by a number": (
        {"messages": [ASK, TELL], "label": 1},
        "write `columns: {messages: messages, good: label}` if true means good",
    ),
    "answers that may be harmful": (
        {"question": "Why?", "answer": "So.", "harmful": False},
        "'harmful' may say which answers not to learn",
    ),
    "openbmb/UltraFeedback": (
        {"instruction": "Why?", "models": ["m"], "completions": [{"response": "So."}]},
        "has no answer beside it",
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
