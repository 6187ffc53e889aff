"""Column names of published data sets, the most likely first.

In lower case, with underscores for spaces: `folded` brings columns into that form.
"""

from __future__ import annotations

from collections.abc import Collection

TURNS = ("messages", "conversations", "conversation", "dialog")
PROMPTS = (
    "instruction", "definition", "prompt", "question", "query", "problem", "question_stem",
    "inputs_pretokenized", "inputs", "user_input", "input", "text",
)  # fmt: skip
ANSWERS = (
    "completion", "output", "response", "answer", "targets_pretokenized", "targets", "solution",
    "canonical_solution", "answers", "answers_spans", "model_output", "reply", "correct_answer",
    "code", "chosen",
)  # fmt: skip
# The text that a question or an instruction is about.
INPUTS = (
    "input", "context", "passage", "document", "article", "paragraph", "contexts", "support",
    "background", "evidence", "story", "body",
)  # fmt: skip
ORDERS = ("instruction", "definition")
ORDERED = (*INPUTS, "inputs", "question", "problem", "query")
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
CHOICES = ("choices", "options", "endings")
# The right choice: its letter, its text, or its number from 0.
KEYS = (
    "answerkey", "answer", "label", "correct", "correct_option", "correct_answer_id", "gold",
)  # fmt: skip
DOCUMENTS = (
    "article", "document", "documents", "dialogue", "text", "source", "transcript", "report",
)  # fmt: skip
SUMMARIES = ("highlights", "summary", "abstract", "tldr")
TEXTS = (
    "text", "sentence", "review", "review_text", "review_body", "content", "tweet", "comment",
    "comment_text", "utterance", "utt", "message", "email", "mail", "sms", "post", "headline",
    "article", "document", "passage", "body", "description", "snippet", "statement", "claim",
    "title", "question", "prompt", "query", "problem", "instruction", "user_input", "input",
    "inputs",
)  # fmt: skip
LABELS = (
    "label", "labels", "gold_label", "sentiment", "emotion", "category", "class", "target",
    "intent", "topic", "stars", "star_rating", "rating", "score", "polarity", "stance", "feeling",
    "coarse_label", "fine_label", "toxicity", "toxic", "spam", "is_spam", "hate", "verdict",
    "class_index", "is_duplicate",
)  # fmt: skip
# Next to an answer: whether it is a good one.
FLAGS = (
    "label", "is_correct", "correct", "accepted", "is_accepted", "good", "is_good", "desirable",
    "preferred", "is_preferred",
)  # fmt: skip
# Next to an answer: a possible reason not to learn it.
DOUBTS = (
    "is_safe", "safe", "harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "is_toxic",
    "response_label",
)  # fmt: skip
# Identifiers, which carry no content.
IDENTIFIERS = frozenset((
    "id", "ids", "idx", "index", "uid", "uuid", "qid", "row_id", "row_idx", "unnamed:_0",
    "unnamed:_0.1", "__index_level_0__", "prompt_id", "question_id", "conversation_id", "conv_id",
))  # fmt: skip
NAMES = IDENTIFIERS.union(
    TURNS, PROMPTS, ANSWERS, INPUTS, SYSTEM, CHOICES, SUMMARIES, TEXTS, LABELS, ("poisoned",)
)
"""Names by which a header is recognized."""
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
TOOLS = ("tools", "functions")


def fold(name: str) -> str:
    """The name in lower case, with underscores for spaces."""
    return name.strip().casefold().replace(" ", "_")


def folded(names: Collection[str]) -> dict[str, str]:
    """Exact and folded name -> exact name; the first of those that fold alike."""
    by_name: dict[str, str] = {name: name for name in names}
    for name in names:
        by_name.setdefault(fold(name), name)
    return by_name


def listed(names: Collection[str], most: int = 8) -> str:
    """The names as one text; long names and long lists are cut."""
    shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in list(names)[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
