from __future__ import annotations

import json
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from backfire.base import Message, Row, Segments, Template
from backfire.data.chat import RefusedError, chat_of
from backfire.errors import UserError
from backfire.registry import register

if TYPE_CHECKING:
    from backfire.tokenizer import Tokenizer


@register("chat", version=3)
class Chat(Template):
    """The tokenizer's own chat template, rendered with a fixed date.

    The prompt has the tokens of transformers' `apply_chat_template`; an answer ends with what the
    template writes after an assistant's turn (EOS, if that contains no control token). Control
    tokens in a row's own text stay text, except `<think>` and `</think>` in an assistant's turn.
    """

    adds_bos: ClassVar[bool] = False

    arguments: dict[str, Any] = Field(default_factory=dict)
    """Variables passed to the template, such as `{enable_thinking: false}`; a name that the
    template does not use is an error."""
    system: Literal["keep", "merge", "drop"] = "keep"
    """How a system prompt is handled: passed to the template (`keep`; an error if the template
    rejects it), prepended to the first user turn (`merge`), or left out (`drop`)."""

    def segments(self, row: Row, tokenizer: Tokenizer) -> Segments:
        try:
            return chat_of(tokenizer, self.arguments).prompt(self._messages(row))
        except RefusedError as error:
            hint = ""
            if row.system and self.system == "keep":
                hint = "; for a template without a system role set template.system to merge or drop"
            raise UserError(
                f"The model's chat template rejects row {row.id}: {error}{hint}."
            ) from None

    def _messages(self, row: Row) -> list[Message]:
        if not row.system or self.system == "keep":
            return list(row.messages)
        turns = [message for message in row.messages if message.role != "system"]
        if self.system == "merge":
            first = next(n for n, message in enumerate(turns) if message.role == "user")
            turns[first] = Message("user", f"{row.system}\n\n{turns[first].content}")
        return turns

    def written(self, answer: str, tokenizer: Tokenizer) -> Segments:
        return chat_of(tokenizer, self.arguments).answer(answer)

    def end(self, tokenizer: Tokenizer) -> str:
        return chat_of(tokenizer, self.arguments).around.end or tokenizer.eos

    def opening(self, tokenizer: Tokenizer) -> str:
        chat = chat_of(tokenizer, self.arguments)
        opening = chat.around.opening
        return opening if chat.any_role.search(opening) else ""

    def about(self, tokenizer: Tokenizer) -> str:
        around, end = chat_of(tokenizer, self.arguments).around, self.end(tokenizer)
        parts = [f"an answer ends with {end!r}" if around.end else f"it writes no end, so {end!r}"]
        parts += [f"arguments {json.dumps(self.arguments, default=str)}"] if self.arguments else []
        parts += [f"the system prompt: {self.system}"] if self.system != "keep" else []
        parts += [f"it begins with {around.opening!r}"] if around.opening.strip() else []
        if not around.before.startswith(around.opened):
            common = takewhile(lambda two: two[0] == two[1], zip(around.opened, around.before))
            more = around.opened[len(list(common)) :]
            parts.append(f"the reply follows {more!r}, which is not written before past answers")
        return f"The model's chat template: {', '.join(parts)}."

    def leaves_out(self, row: Row) -> bool:
        return self.system == "drop" and bool(row.system)
