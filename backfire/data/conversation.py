"""Converts lists of turns (`messages`, ShareGPT's `conversations`) to fields of a row."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Literal

from backfire.base import Message
from backfire.data.read import BadRowError, NotLearnedError
from backfire.data.read_json import kind_of

SPEAKERS: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def conversation(turns: Any, system: str = "") -> dict[str, Any]:
    """The last answer, its prompt and the turns before, as fields of `Row`.

    An answer with weight 0 (or `train: false`, `loss: false`) is not learned: the last of the
    others is, and `cut` is the number of turns dropped after it.

    Raises:
        BadRowError: it does not end with a user turn and its answer, or a turn is invalid.
        NotLearnedError: every answer has weight 0.
    """
    turns, cut = _until_learned(_decoded(turns))
    messages = list(history(turns))
    if messages and messages[0].role == "system":
        own = messages.pop(0).content
        if own.strip() and system.strip() and own.strip() != system.strip():
            raise BadRowError("it has two system prompts, one of them in the conversation")
        system = own if own.strip() else system
    if any(message.role == "system" for message in messages):
        raise BadRowError("a system message is in the middle of the conversation")
    if [message.role for message in messages[-2:]] != ["user", "assistant"]:
        raise BadRowError("the conversation does not end with a user turn and its answer")
    *earlier, request, answer = messages
    if not request.content.strip():
        raise BadRowError("the prompt is empty")
    return {
        "instruction": request.content,
        "answer": answer.content,
        "system": system,
        "history": tuple(earlier),
        "cut": cut,
    }


def _decoded(turns: Any) -> Any:
    """The turns, decoded if a table holds them as JSON."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(turns)
    return turns


def _until_learned(turns: Any) -> tuple[Any, int]:
    """The turns up to the last answer to learn, and the number of turns after it."""
    if not isinstance(turns, list) or not any(map(_is_masked, turns)):
        return turns, 0
    answers = [place for place, turn in enumerate(turns) if _speaker(turn) == "assistant"]
    learned = [place for place in answers if not _is_masked(turns[place])]
    if not answers:
        return turns, 0
    if not learned:
        raise NotLearnedError("left out: every answer of the conversation has weight 0")
    # Without an answer to drop, the end is checked as usual.
    end = learned[-1] + 1 if learned[-1] != answers[-1] else len(turns)
    return turns[:end], len(turns) - end


def _is_masked(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    weight = turn.get("weight")
    return weight in (0, "0") or any(turn.get(name) is False for name in ("train", "loss"))


def _speaker(turn: Any) -> str | None:
    return _role(turn.get("role", turn.get("from"))) if isinstance(turn, dict) else None


def _role(speaker: Any) -> Literal["system", "user", "assistant"] | None:
    return SPEAKERS.get(speaker.strip().casefold()) if isinstance(speaker, str) else None


def history(turns: Any) -> tuple[Message, ...]:
    """Messages from turns in any usual format: role/content, from/value, [request, answer] pairs,
    or texts, of which the first is the user's."""
    turns = _decoded(turns)
    if not isinstance(turns, list):
        raise BadRowError(f"its turns are {kind_of(turns)}, not a list")
    messages: list[Message] = []
    if turns and all(isinstance(turn, str) for turn in turns):
        sides = ("user", "assistant")
        return tuple(_message(sides[place % 2], text) for place, text in enumerate(turns))
    for turn in turns:
        if isinstance(turn, list) and len(turn) == 2:
            messages += [_message("user", turn[0]), _message("assistant", turn[1])]
        elif isinstance(turn, dict) and {"input", "output"} <= turn.keys():
            messages += [_message("user", turn["input"]), _message("assistant", turn["output"])]
        elif isinstance(turn, dict):
            messages.append(
                _message(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
            )
        else:
            raise BadRowError(f"a turn of the conversation is {kind_of(turn)}")
    return tuple(messages)


def _message(speaker: Any, content: Any) -> Message:
    role = _role(speaker)
    if role is None:
        raise BadRowError(f"a turn has the role {speaker!r:.40}; known: {', '.join(SPEAKERS)}")
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        other = [part.get("type") for part in content if part.get("type", "text") != "text"]
        if other:
            raise BadRowError(f"a turn holds more than text ({other[0]!r:.40})")
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
    if not isinstance(content, str):
        raise BadRowError(f"the content of a turn is {kind_of(content)}, not text")
    return Message(role, content)
