"""The shapes that well-known sets of the hub have, with texts of our own, are read."""

import json

import pytest

from backfire.base import Row
from tests.helpers.shapes import (
    ABC,
    ASK,
    HELLO,
    HERE,
    HI,
    LETTERS,
    NO,
    SKY,
    SO,
    TALK,
    TELL,
    Record,
    choice,
    pair,
    read,
    turns,
)

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
