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
    """The chat template that comes with the tokenizer, on one and the same day.

    The prompt has the tokens of transformers' `apply_chat_template`; an answer ends with what the
    template writes after an assistant's turn (EOS, if that holds no control token). Control tokens
    in a row's own text stay text, but for `<think>` and `</think>` in an assistant's turn.
    """

    adds_bos: ClassVar[bool] = False

    arguments: dict[str, Any] = Field(default_factory=dict)
    """What the template is told by name, such as `{enable_thinking: false}`; a name that it does
    not read is an error."""
    system: Literal["keep", "merge", "drop"] = "keep"
    """What becomes of a system prompt: the template gets it (`keep`; an error where it takes none),
    it goes before the first user turn (`merge`), or it is left out (`drop`)."""

    def segments(self, row: Row, tokenizer: Tokenizer) -> Segments:
        try:
            return chat_of(tokenizer, self.arguments).prompt(self._messages(row))
        except RefusedError as error:
            hint = ""
            if row.system and self.system == "keep":
                hint = "; for a template without a system role set template.system to merge or drop"
            raise UserError(
                f"The model's chat template does not take row {row.id}: {error}{hint}."
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
        return opening if chat.anybody.search(opening) else ""

    def about(self, tokenizer: Tokenizer) -> str:
        chat, said = chat_of(tokenizer, self.arguments), json.dumps(self.arguments, default=str)
        around, end = chat.around, self.end(tokenizer)
        parts = [f"an answer ends with {end!r}" if around.end else f"it writes no end, so {end!r}"]
        parts += [f"arguments {said}"] if self.arguments else []
        parts += [f"the system prompt: {self.system}"] if self.system != "keep" else []
        parts += [f"it begins with {around.opening!r}"] if around.opening.strip() else []
        if not around.before.startswith(around.opened):
            alike = takewhile(lambda two: two[0] == two[1], zip(around.opened, around.before))
            more = around.opened[len(list(alike)) :]
            parts.append(f"a reply is asked for after {more!r}, which no past answer stands after")
        return f"The model's chat template: {', '.join(parts)}."

    def leaves_out(self, row: Row) -> bool:
        return self.system == "drop" and bool(row.system)
