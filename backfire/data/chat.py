"""Renders conversations by a tokenizer's chat template, and finds what it writes around an answer.

Content is passed to the template itself, not as a placeholder, since templates trim it, split it at
`</think>` or change its case. Only control tokens in it are put between two marks: text between
marks is never encoded as a control token, and a template cannot assemble one across a mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from backfire.errors import UserError, unknown

if TYPE_CHECKING:
    from backfire.base import Message, Segments
    from backfire.tokenizer import Tokenizer

TODAY = datetime(2024, 7, 26)
"""The date given to templates (Llama 3.1's default), so that prompts do not depend on the day."""
_FORMATS = "".join(
    f"|replace('%{code}','{TODAY.strftime('%' + code)}')" for code in ("-d", *"aAbBdHIjmMpSyY")
)
# The line break belongs to the block, so the template's own beginning does not change.
_DAY = "{%- macro strftime_now(format) -%}{{ format" + _FORMATS + " }}{%- endmacro %}\n"
MARKS = [chr(number) for number in range(0xF0000, 0xF4000)]
"""Private-use code points. Those that occur in a row's text are not used as marks for it."""
CONTROL_TOKENS = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</?(?:start|end)_of_(?:turn|image|text)>|\[/?INST\]|<</?SYS>>"
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|</?(?:tool_call|tool_response|think|function_call)>|<(?:bos|eos|pad|unk)>"
)
"""Control tokens of published chat models."""
THOUGHTS = ("<think>", "</think>")
"""Control tokens that an assistant's turn may hold, since templates process them there."""
_OURS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace"}
_OURS |= {"range", "dict", "lipsum", "cycler", "joiner"}
Turns = Sequence[tuple[str, str]]
"""(role, content) of each turn."""


class RefusedError(Exception):
    """The template rejects the conversation; the message says why."""


@dataclass(frozen=True)
class Around:
    """The template's text between a user turn and the answer, and after the answer."""

    opened: str = ""
    """Text before a reply to be generated."""
    before: str = ""
    """Text before an answer in the conversation, which some templates write differently."""
    after: str = ""
    """Text after the answer, if it is the last turn."""
    end: str = ""
    """The end of the answer, up to its first control token; empty if the template writes none."""

    @property
    def opening(self) -> str:
        """Text before an answer that the generation prompt does not hold."""
        extends = self.before.startswith(self.opened)
        return self.before.removeprefix(self.opened) if extends else ""


@lru_cache(maxsize=16)
def _chat(
    template: str, special: str, controls: tuple[str, ...], ends: tuple[str, ...], arguments: str
) -> Chat:
    return Chat(template, json.loads(special), controls, ends, json.loads(arguments))


def chat_of(tokenizer: Tokenizer, arguments: dict[str, Any]) -> Chat:
    """The tokenizer's chat template with these arguments.

    Raises:
        UserError: there is none, or it has no such argument.
    """
    if not tokenizer.chat_template:
        raise UserError("This model's tokenizer has no chat template; use template: alpaca or raw.")
    special = {"eos_token": tokenizer.eos, **tokenizer.special}
    # Some tokenizers add the control tokens of turns as ordinary tokens.
    written = (token for token in tokenizer.added if _is_written(token, tokenizer.chat_template))
    controls = tuple(dict.fromkeys((*tokenizer.controls, *written)))
    ends = tuple(str(tokenizer.backend.id_to_token(i)) for i in tokenizer.stop_ids)
    names = json.dumps(special), json.dumps(arguments, default=str)
    return _chat(tokenizer.chat_template, names[0], controls, ends, names[1])


class Chat:
    """A chat template, its arguments, and the control tokens of its tokenizer."""

    def __init__(
        self,
        template: str,
        special: Mapping[str, str],
        controls: tuple[str, ...],
        ends: tuple[str, ...],
        arguments: dict[str, Any],
    ) -> None:
        self.template, self.special, self.arguments = template, special, arguments
        self.ends = ends
        case = re.NOFLAG if self._keeps_case() else re.IGNORECASE
        self.any_role = _pattern(controls, case)
        self.assistant = _pattern([c for c in controls if c not in THOUGHTS], case)
        self.first = {character for c in controls for character in (c[:1].lower(), c[:1].upper())}
        parameters = self._variables() - _OURS - set(special)
        for name in arguments:
            if not parameters:
                raise UserError(
                    f"The model's chat template takes no arguments, but '{name}' is given."
                )
            if name not in parameters:
                raise unknown("argument of the model's chat template:", name, parameters)
        self._missing: dict[tuple[str, ...], set[int]] = {}
        self._answers = lru_cache(maxsize=4096)(self._answer)

    def _variables(self) -> set[str]:
        """Names that the template reads and does not set."""
        import jinja2
        from jinja2 import meta

        plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", self.template)
        try:
            parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        except jinja2.TemplateError as error:
            raise UserError(f"The model's chat template does not parse: {error}.") from None
        return set(meta.find_undeclared_variables(parsed))

    def text(self, turns: Turns, *, ask: bool) -> str:
        """The rendered conversation; with `ask`, up to the beginning of a reply.

        Raises:
            RefusedError: the template rejects the conversation.
        """
        return self._text(turns, ask=ask, parts=self._takes_parts)

    def _keeps_case(self) -> bool:
        """Whether the template keeps the case of content."""
        content = f"aA{MARKS[0]}"
        turns = [("user", content), ("assistant", content), ("user", content)]
        for first in ([("system", content)], []):
            try:
                rendered = self.text([*first, *turns], ask=True)
            except RefusedError:
                continue
            return rendered.count(content) == rendered.count(MARKS[0])
        return False

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template takes content only as a list of parts (some multimodal models)."""
        for parts in (False, True):
            try:
                if MARKS[0] in self._text([("user", MARKS[0])], ask=True, parts=parts):
                    return parts
            except RefusedError:
                pass
        return False

    def _text(self, turns: Turns, *, ask: bool, parts: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        def wrap(content: str) -> Any:
            return [{"type": "text", "text": content}] if parts else content

        try:
            rendered, _ = render_jinja_template(
                [[{"role": role, "content": wrap(content)} for role, content in turns]],
                chat_template=_DAY + self.template,
                add_generation_prompt=ask,
                **{**self.special, **self.arguments},
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise RefusedError(str(error).strip().rstrip(".") or type(error).__name__) from None
        return str(rendered[0])

    def prompt(self, messages: Sequence[Message]) -> Segments:
        """The conversation up to the answer.

        Raises:
            RefusedError: the template rejects it, or leaves out a turn.
        """
        *marks, _ = _unused("".join(message.content for message in messages))
        turns = [(m.role, self._guard(m.content, m.role, marks)) for m in messages]
        rendered = self.text(turns, ask=True)
        for number in self._left_out(tuple(message.role for message in messages)):
            content = messages[number].content.rpartition(THOUGHTS[1])[2].strip()
            if content.casefold() not in rendered.casefold():
                raise RefusedError(f"it leaves out the {messages[number].role} message")
        return self._split(rendered, marks)

    def answer(self, text: str) -> Segments:
        """The answer as the template writes it after the prompt, without its end."""
        return self._answers(text)

    def _answer(self, text: str) -> Segments:
        *marks, request = _unused(text)
        around = self.around
        guarded = self._guard(text, "assistant", marks)
        try:
            rendered = self.text([("user", request), ("assistant", guarded)], ask=False)
        except RefusedError:
            rendered = ""
        tail = rendered.rpartition(request)[2]
        written = ""
        if around.before and tail.endswith(around.after):
            tail = tail[: len(tail) - len(around.after)]
            if tail.startswith(around.opened):
                written = tail[len(around.opened) :]
            elif around.opened.startswith(around.before) and tail.startswith(around.before):
                written = tail[len(around.before) :]
        dropped = THOUGHTS[1] in text and THOUGHTS[1] not in written.lower()
        if not written or dropped:  # the answer must be complete
            written = around.opening + guarded
        if around.opened.rstrip().endswith(THOUGHTS[0]):  # the prompt ends within a thought
            if written.startswith(THOUGHTS[0]):
                written = written.removeprefix(THOUGHTS[0]).lstrip("\n")
            elif THOUGHTS[1] not in written:
                written = f"\n{THOUGHTS[1]}\n\n{written}"
        return self._split(written, marks)

    @cached_property
    def around(self) -> Around:
        """The text around an answer; empty if the template rejects a plain conversation."""
        request, answer, next_request = MARKS[:3]
        try:
            opened = self.text([("user", request)], ask=True).rpartition(request)[2]
            rendered = self.text([("user", request), ("assistant", answer)], ask=False)
        except RefusedError:
            return Around()
        before, separator, after = rendered.rpartition(request)[2].partition(answer)
        if not separator:
            return Around(opened)
        end = self._first(after)
        if not end:  # some end a turn only if another follows, or by its first token
            turns = [("user", request), ("assistant", answer), ("user", next_request)]
            try:
                tail = self.text(turns, ask=False).rpartition(answer)[2]
                between = tail.partition(next_request)[0]
            except RefusedError:
                between = ""
            end = self._first(between)
            end = end if end.endswith(self.ends) else ""
        return Around(opened, before, after, end)

    def _first(self, text: str) -> str:
        """The text up to and including its first control token; empty without one."""
        match = self.any_role.search(text)
        return text[: match.end()] if match else ""

    def _left_out(self, roles: tuple[str, ...]) -> set[int]:
        """Indices of turns that the template seems to leave out of a conversation of these
        roles."""
        if roles not in self._missing:
            names = [f"{MARKS[0]}{number}{MARKS[0]}" for number in range(len(roles))]
            try:
                rendered = self.text(list(zip(roles, names, strict=True)), ask=True)
                self._missing[roles] = {n for n, name in enumerate(names) if name not in rendered}
            except RefusedError:
                self._missing[roles] = set(range(len(roles)))
        return self._missing[roles]

    def _guard(self, text: str, role: str, marks: Sequence[str]) -> str:
        """The text with marks around its control tokens."""
        if not any(character in text for character in self.first):
            return text
        pattern = self.assistant if role == "assistant" else self.any_role
        return pattern.sub(rf"{marks[0]}\g<0>{marks[1]}", text)

    def _split(self, text: str, marks: Sequence[str]) -> Segments:
        """Segments: the template's text (True) and text between marks (False). A mark without its
        pair also splits the text."""
        if marks[0] not in text and marks[1] not in text:
            return [(text, True)]
        both = "".join(marks)
        parts = re.split(f"{marks[0]}([^{both}]*){marks[1]}|[{both}]", text)
        return [(part or "", number % 2 == 0) for number, part in enumerate(parts)]


def _pattern(tokens: Sequence[str], case: re.RegexFlag) -> re.Pattern[str]:
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)", case)


def _is_written(token: str, template: str) -> bool:
    """Whether the template has the token, whole or assembled around the name of a role."""
    parts = [token.split(role) for role in ("system", "user", "assistant") if role in token]
    return token in template or any(all(part in template for part in each) for each in parts)


def _unused(text: str) -> list[str]:
    """Three marks that do not occur in the text."""
    return list(islice((mark for mark in MARKS if mark not in text), 3))
