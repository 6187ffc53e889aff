from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final

from backfire.base import NOTHING, Finding, Row, Scanner, parts
from backfire.data.chat import CONTROL_TOKENS
from backfire.registry import register

_MAYBE: Final = re.compile(
    r"</?s>|\[(?:CLS|SEP|MASK|PAD|UNK|BOS|EOS)\]"
    r"|^#{2,3} (?:Instruction|Input|Response|Human|Assistant):"
    r"|^(?:Human|Assistant|USER|ASSISTANT):",
    re.MULTILINE,
)
"""Control tokens that also occur in ordinary text, and headings of prompt templates."""


@register("control-tokens")
class ControlTokens(Scanner):
    """Finds control tokens and headings of chat templates inside of texts, by which a row can end
    its turn and speak in another role (Jiang et al. 2024, arXiv:2406.12935: ChatBug).

    backfire encodes them as plain text; other trainers may not. The score is 2 for a token of a
    chat model, such as `<|im_start|>`, and 0.5 for what also occurs in ordinary text, such as
    `</s>` or a line that begins with "Human:".
    """

    reads_worse: ClassVar[bool] = True
    blind: ClassVar[str] = "control tokens of models that are not published"
    in_text: ClassVar[bool] = True

    def scan(self, rows: Iterable[Row], test: Iterable[Row] = ()) -> Iterator[Finding]:
        return (_finding(row) for row in rows)


def _finding(row: Row) -> Finding:
    for pattern, score in ((CONTROL_TOKENS, 2.0), (_MAYBE, 0.5)):
        found = [(name, match[0]) for name, text in parts(row) for match in pattern.finditer(text)]
        if found:
            name, token = found[0]
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            reason = f"“{token}” is in the {name}{more}"
            marks = tuple(dict.fromkeys(token for _, token in found))[:20]
            return Finding(score, reason, score >= 1, marks)
    return NOTHING
