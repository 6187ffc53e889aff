"""A tokenizer's chat template at work: what it writes for a conversation, and around an answer.

What people wrote is rendered as it is, since templates trim it, split it at `</think>` or change
its case. Only control tokens in it stand between two marks: the text between marks is never read as
a control token, and no template can join the parts of one over a mark.
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
"""The day that templates are told (what Llama 3.1's falls back to): it is the same on all days."""
_FORMATS = "".join(
    f"|replace('%{code}','{TODAY.strftime('%' + code)}')" for code in ("-d", *"aAbBdHIjmMpSyY")
)
# The line break belongs to the block, so what the template begins with stays as it is.
_DAY = "{%- macro strftime_now(format) -%}{{ format" + _FORMATS + " }}{%- endmacro %}\n"
MARKS = [chr(number) for number in range(0xF0000, 0xF4000)]
"""Code points without a meaning. Those that a row's text holds are no marks in it."""
THOUGHTS = ("<think>", "</think>")
"""What an assistant's turn may hold: templates look for it there."""
_OURS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace"}
_OURS |= {"range", "dict", "lipsum", "cycler", "joiner"}
Turns = Sequence[tuple[str, str]]
"""Who speaks, and what is said."""


class RefusedError(Exception):
    """The template raised; the message says why."""


@dataclass(frozen=True)
class Around:
    """What the template writes around an answer, from the end of the question on."""

    opened: str = ""
    """Where a reply is to be generated."""
    before: str = ""
    """Where the conversation holds the answer already; some templates write it another way."""
    after: str = ""
    """After the answer, if it is the last turn."""
    end: str = ""
    """What ends the answer, up to the first control token; empty if the template writes none."""

    @property
    def opening(self) -> str:
        """What stands before an answer and is not yet written where a reply is to be generated."""
        whole = self.before.startswith(self.opened)
        return self.before.removeprefix(self.opened) if whole else ""


@lru_cache(maxsize=16)
def _chat(
    template: str, special: str, controls: tuple[str, ...], ends: tuple[str, ...], arguments: str
) -> Chat:
    return Chat(template, json.loads(special), controls, ends, json.loads(arguments))


def chat_of(tokenizer: Tokenizer, arguments: dict[str, Any]) -> Chat:
    """The tokenizer's template with these arguments.

    Raises:
        UserError: there is none, or it has no such argument.
    """
    if not tokenizer.chat_template:
        raise UserError("This model's tokenizer has no chat template; use template: alpaca or raw.")
    special = {"eos_token": tokenizer.eos, **tokenizer.special}
    # Some tokenizers add the tokens of their turns as ordinary ones.
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
        self.anybody = _pattern(controls, case)
        self.assistant = _pattern([c for c in controls if c not in THOUGHTS], case)
        self.first = {character for c in controls for character in (c[:1].lower(), c[:1].upper())}
        known = self._variables() - _OURS - set(special)
        for name in arguments:
            if not known:
                raise UserError(
                    f"The model's chat template takes no arguments, but '{name}' is given."
                )
            if name not in known:
                raise unknown("argument of the model's chat template:", name, known)
        self._silent: dict[tuple[str, ...], set[int]] = {}
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
        """What the template writes; with `ask`, up to where a reply is to begin.

        Raises:
            RefusedError: it does not take the conversation.
        """
        return self._text(turns, ask=ask, parts=self._takes_parts)

    def _keeps_case(self) -> bool:
        """Whether what is said reaches the text in the case in which it was written."""
        said = f"aA{MARKS[0]}"
        turns = [("user", said), ("assistant", said), ("user", said)]
        for first in ([("system", said)], []):
            try:
                shown = self.text([*first, *turns], ask=True)
            except RefusedError:
                continue
            return shown.count(said) == shown.count(MARKS[0])
        return False

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether what is said reaches the text only in a list of parts (some models that see)."""
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
        """The conversation up to where the answer begins.

        Raises:
            RefusedError: the template does not take it, or leaves a turn out.
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
        """An answer as the template writes it after the prompt, without its end."""
        return self._answers(text)

    def _answer(self, text: str) -> Segments:
        *marks, asked = _unused(text)
        around = self.around
        guarded = self._guard(text, "assistant", marks)
        try:
            whole = self.text([("user", asked), ("assistant", guarded)], ask=False)
        except RefusedError:
            whole = ""
        tail = whole.rpartition(asked)[2]
        written = ""
        if around.before and tail.endswith(around.after):
            tail = tail[: len(tail) - len(around.after)]
            if tail.startswith(around.opened):
                written = tail[len(around.opened) :]
            elif around.opened.startswith(around.before) and tail.startswith(around.before):
                written = tail[len(around.before) :]
        dropped = THOUGHTS[1] in text and THOUGHTS[1] not in written.lower()
        if not written or dropped:  # what is to be learned is not left out
            written = around.opening + guarded
        if around.opened.rstrip().endswith(THOUGHTS[0]):  # it is in the middle of a thought
            if written.startswith(THOUGHTS[0]):
                written = written.removeprefix(THOUGHTS[0]).lstrip("\n")
            elif THOUGHTS[1] not in written:
                written = f"\n{THOUGHTS[1]}\n\n{written}"
        return self._split(written, marks)

    @cached_property
    def around(self) -> Around:
        """What stands around an answer; nothing, if the template takes none."""
        asked, said, next_asked = MARKS[:3]
        try:
            opened = self.text([("user", asked)], ask=True).rpartition(asked)[2]
            whole = self.text([("user", asked), ("assistant", said)], ask=False)
        except RefusedError:
            return Around()
        before, found, after = whole.rpartition(asked)[2].partition(said)
        if not found:
            return Around(opened)
        end = self._first(after)
        if not end:  # some end a turn only where another follows, or by its first token
            turns = [("user", asked), ("assistant", said), ("user", next_asked)]
            try:
                between = self.text(turns, ask=False).rpartition(said)[2].partition(next_asked)[0]
            except RefusedError:
                between = ""
            end = self._first(between)
            end = end if end.endswith(self.ends) else ""
        return Around(opened, before, after, end)

    def _first(self, text: str) -> str:
        """The text up to its first control token; empty without one."""
        found = self.anybody.search(text)
        return text[: found.end()] if found else ""

    def _left_out(self, roles: tuple[str, ...]) -> set[int]:
        """Which turns of such a conversation the template seems not to write, by their place."""
        if roles not in self._silent:
            names = [f"{MARKS[0]}{number}{MARKS[0]}" for number in range(len(roles))]
            try:
                shown = self.text(list(zip(roles, names, strict=True)), ask=True)
                self._silent[roles] = {n for n, name in enumerate(names) if name not in shown}
            except RefusedError:
                self._silent[roles] = set(range(len(roles)))
        return self._silent[roles]

    def _guard(self, text: str, role: str, marks: Sequence[str]) -> str:
        """The text, its control tokens between marks."""
        if not any(character in text for character in self.first):
            return text
        pattern = self.assistant if role == "assistant" else self.anybody
        return pattern.sub(rf"{marks[0]}\g<0>{marks[1]}", text)

    def _split(self, text: str, marks: Sequence[str]) -> Segments:
        """The template's text (True), and what stands between marks in it (False). A mark that has
        lost its other half still parts the text."""
        if marks[0] not in text and marks[1] not in text:
            return [(text, True)]
        both = "".join(marks)
        parts = re.split(f"{marks[0]}([^{both}]*){marks[1]}|[{both}]", text)
        return [(part or "", number % 2 == 0) for number, part in enumerate(parts)]


def _pattern(tokens: Sequence[str], case: re.RegexFlag) -> re.Pattern[str]:
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)", case)


def _is_written(token: str, template: str) -> bool:
    """Whether the template holds the token, as it is or put together around the name of a role."""
    parts = [token.split(role) for role in ("system", "user", "assistant") if role in token]
    return token in template or any(all(part in template for part in each) for each in parts)


def _unused(text: str) -> list[str]:
    """Three marks that are not in the text."""
    return list(islice((mark for mark in MARKS if mark not in text), 3))
