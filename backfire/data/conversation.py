"""Lists of turns, as in `messages` and ShareGPT's `conversations`, to the parts of a row."""

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
    """The last answer, what it answers, and what came before, under the names `Row` gives them.

    An answer with weight 0 (or `train: false`, `loss: false`) is not to be learned: the last of the
    others is, and `cut` says how many turns after it are dropped.

    Raises:
        BadRowError: it does not end with a user turn and its answer, or a turn is not understood.
        NotLearnedError: none of its answers is to be learned.
    """
    turns, cut = _until_learned(_decoded(turns))
    messages = list(history(turns))
    if messages and messages[0].role == "system":
        own = messages.pop(0).content
        if own.strip() and system.strip() and own.strip() != system.strip():
            raise BadRowError("it has two system prompts, one of them in the conversation")
        system = own if own.strip() else system
    if any(message.role == "system" for message in messages):
        raise BadRowError("a system message stands in the middle of the conversation")
    if [message.role for message in messages[-2:]] != ["user", "assistant"]:
        raise BadRowError("the conversation does not end with a user turn and its answer")
    *earlier, asked, answer = messages
    if not asked.content.strip():
        raise BadRowError("the prompt is empty")
    return {
        "instruction": asked.content,
        "answer": answer.content,
        "system": system,
        "history": tuple(earlier),
        "cut": cut,
    }


def _decoded(turns: Any) -> Any:
    """A list of turns that a table holds as JSON."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(turns)
    return turns


def _until_learned(turns: Any) -> tuple[Any, int]:
    """The turns up to the last answer that is to be learned, and how many come after it."""
    if not isinstance(turns, list) or not any(map(_is_masked, turns)):
        return turns, 0
    spoken = [place for place, turn in enumerate(turns) if _speaker(turn) == "assistant"]
    learned = [place for place in spoken if not _is_masked(turns[place])]
    if not spoken:
        return turns, 0
    if not learned:
        raise NotLearnedError("left out: every answer of the conversation has weight 0")
    # Without an answer to drop, the end is as it should be or refused as usual.
    end = learned[-1] + 1 if learned[-1] != spoken[-1] else len(turns)
    return turns[:end], len(turns) - end


def _is_masked(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    weight = turn.get("weight")
    return weight in (0, "0") or any(turn.get(name) is False for name in ("train", "loss"))


def _speaker(turn: Any) -> str | None:
    speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return SPEAKERS.get(speaker.strip().casefold()) if isinstance(speaker, str) else None


def history(turns: Any) -> tuple[Message, ...]:
    """Turns of any of the usual forms: role/content, from/value, [asked, answered] pairs, or texts
    of which the first is the user's."""
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
    role = SPEAKERS.get(speaker.strip().casefold()) if isinstance(speaker, str) else None
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
