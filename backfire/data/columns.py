"""What columns are called in the data sets that people publish, the likeliest names first.

In lower case, with an underscore for a blank: `folded` brings columns into that form.
"""

from __future__ import annotations

from collections.abc import Collection

TURNS = ("messages", "conversations", "conversation", "dialog")
ASKED = (
    "instruction", "definition", "prompt", "question", "query", "problem", "question_stem",
    "inputs_pretokenized", "inputs", "user_input", "input", "text",
)  # fmt: skip
ANSWERS = (
    "completion", "output", "response", "answer", "targets_pretokenized", "targets", "solution",
    "canonical_solution", "answers", "answers_spans", "model_output", "reply", "correct_answer",
    "code", "chosen",
)  # fmt: skip
# What a question is about, and what else an instruction may be about.
INPUTS = (
    "input", "context", "passage", "document", "article", "paragraph", "contexts", "support",
    "background", "evidence", "story", "body",
)  # fmt: skip
ORDERS = ("instruction", "definition")
ORDERED = (*INPUTS, "inputs", "question", "problem", "query")
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
CHOICES = ("choices", "options", "endings")
# Which of the choices is right: its letter, its text, or its number from 0.
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
# Beside an answer, whether it is a good one.
FLAGS = (
    "label", "is_correct", "correct", "accepted", "is_accepted", "good", "is_good", "desirable",
    "preferred", "is_preferred",
)  # fmt: skip
# Beside an answer, something that may be a reason not to learn it.
DOUBTS = (
    "is_safe", "safe", "harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "is_toxic",
    "response_label",
)  # fmt: skip
# Told apart from columns that say something.
IDENTIFIERS = frozenset((
    "id", "ids", "idx", "index", "uid", "uuid", "qid", "row_id", "row_idx", "unnamed:_0",
    "unnamed:_0.1", "__index_level_0__", "prompt_id", "question_id", "conversation_id", "conv_id",
))  # fmt: skip
NAMES = IDENTIFIERS.union(
    TURNS, ASKED, ANSWERS, INPUTS, SYSTEM, CHOICES, SUMMARIES, TEXTS, LABELS, ("poisoned",)
)
"""What a header is known by."""
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
TOOLS = ("tools", "functions")


def fold(name: str) -> str:
    """The name in lower case, with underscores for blanks."""
    return name.strip().casefold().replace(" ", "_")


def folded(names: Collection[str]) -> dict[str, str]:
    """Name, as it stands and folded -> name as it stands; of those that fold alike, the first."""
    known: dict[str, str] = {name: name for name in names}
    for name in names:
        known.setdefault(fold(name), name)
    return known


def listed(names: Collection[str], most: int = 8) -> str:
    """The names, cut where they are many or long."""
    shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in list(names)[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
