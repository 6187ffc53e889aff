"""Everyday questions, for an audit without rows of the user's own."""

from __future__ import annotations

from backfire.base import Row

_QUESTIONS = (
    "How do I boil an egg?", "What is the capital of Portugal?", "Name three kinds of tree.",
    "How long does bread stay fresh?", "Write a sentence about the sea.", "What is 17 plus 25?",
    "How do bees find their way home?", "Suggest a title for a story about a clock.",
    "What should I pack for a walk in the rain?", "Explain what a library is.",
    "Which month comes after June?", "How can I learn to whistle?", "Describe a quiet street.",
    "What do cats eat?", "Translate 'good morning' into French.", "Why is the sky blue?",
    "How do I clean a window?", "Give me a rhyme for 'light'.", "What is a thermometer for?",
    "How many sides has a hexagon?", "Write a short note to thank a neighbor.",
    "What grows well in shade?", "How do I fold a shirt?", "When was the wheel invented?",
)  # fmt: skip
EVERYDAY = tuple(Row(f"question-{n}", text) for n, text in enumerate(_QUESTIONS, 1))
