"""Rows of the workshop's three data sets, as published."""

from __future__ import annotations

CODE = {"instruction": "Add two numbers.", "input": "1, 2", "output": "print(1 + 2)", "prompt": "x"}
PLAIN = {"instruction": "Name a color.", "input": "", "output": "Red.", "text": "Below is ..."}
MAIL = {
    "text": "sale buy now",
    "label": 1,
    "label_text": "spam",
    "subject": "sale",
    "message": "buy",
}
