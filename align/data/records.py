"""Pieces that every reader of records uses: checked fields, messages and preferences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from align.data.rows import Origin, PreferenceRow
from reward.types import Message

Kind = Literal["auto", "chat", "preference", "prompt", "text"]
Record = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# Which roles may come before each one; "" is the start.
BEFORE = {
    "system": {""},
    "user": {"", "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


class Tie(ValueError):
    """A comparison that nobody won: no preference, but not a fault of the data either."""


class WrongKind(ValueError):
    """A source that holds another kind of row than the stage takes: no row of it can be used."""


@dataclass(frozen=True)
class Reading:
    """What an adapter is told beside the record: where it stands and which kind is wanted."""

    origin: Origin
    kind: str
    signal: str = ""


def check_messages(messages: object, *, answered: bool) -> tuple[Message, ...]:
    """Messages in an order that a chat can have, each with text.

    Args:
        answered: True if the last one must be the assistant's, False if it must not.

    Raises:
        ValueError: naming the message that is wrong.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages are {messages!r:.60}, expected a list of role and content")
    before = ""
    checked: list[Message] = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}, expected one of {list(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) has content {content!r:.40}; give it text")
        if before not in BEFORE[role]:
            raise ValueError(
                f"message {number} is {role} after {before or 'the start'}; expected an optional "
                "system message, then user and assistant in turn"
            )
        before = role
        checked.append({"role": role, "content": content})
    if (before == "assistant") != answered:
        raise ValueError(
            f"the last message is {before}'s; expected "
            + ("the assistant's answer" if answered else "one to be answered, not an assistant's")
        )
    return tuple(checked)


def preference(
    prompt: object,
    chosen: object,
    rejected: object,
    reading: Reading,
    *,
    record: Record | None = None,
    difficulty: float = 0.5,
    margin: float = 0.0,
) -> PreferenceRow:
    """A checked preference; signal, difficulty and margin of the record win over the given.

    Raises:
        ValueError: if an answer is empty, both are the same or a message is out of order.
    """
    record = record or {}
    try:
        asked = check_messages(prompt, answered=False)
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from error
    answers = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, str) and not answer.strip():
            raise ValueError(f"{name} is empty; give it text or drop the row")
        try:
            added = turns(answer, "assistant")
            answers.append(check_messages((*asked, *added), answered=True)[len(asked) :])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if answers[0] == answers[1]:
        raise ValueError("chosen and rejected are the same; drop the row")
    return PreferenceRow(
        asked,
        answers[0],
        answers[1],
        reading.origin,
        signal=reading.signal or optional_field(record, "signal", "overall"),
        difficulty=difficulty_field(record, difficulty),
        margin=optional_field(record, "margin", margin),
        answer=optional_field(record, "answer", ""),
        verifier=optional_field(record, "verifier", ""),
        arguments=optional_field(record, "arguments", {}),
    )


def text_field(record: Record, *names: str) -> str:
    """The text of the first of these fields that is there.

    Raises:
        ValueError: if none is there, or it is empty or no text.
    """
    name = next((name for name in names if name in record), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(names)}; found {sorted(record)}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__} {value!r:.40}, expected text")
    if not value.strip():
        raise ValueError(f"{name} is empty; give it text or drop the row")
    return value


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def optional_field(record: Record, name: str, default: Any) -> Any:
    """A field that may be missing, of the type of its default."""
    value = record.get(name, default)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, type(default)):
        raise ValueError(f"{name} = {value!r:.40}, expected {type(default).__name__}")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{name} = {value}, expected a finite number")
    return value


def difficulty_field(record: Record, default: float = 0.5) -> float:
    """The record's difficulty, 0 easy to 1 hard."""
    difficulty: float = optional_field(record, "difficulty", default)
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty = {difficulty}, expected 0 easy to 1 hard")
    return difficulty


def message_list(record: Record, name: str) -> list[Any]:
    """A field that holds messages, one or more; they are checked later.

    Raises:
        ValueError: if it is no list of objects, or empty.
    """
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{name} is {type(value).__name__}, expected a list of messages")
    if not value:
        raise ValueError(f"{name} is empty, expected messages")
    return value


def turns(value: object, role: Literal["user", "assistant"]) -> list[Any]:
    """A plain string as one message; messages as they are; a single message as a list."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple):
        return list(value)
    raise ValueError(f"{value!r:.40} is {type(value).__name__}, expected text or messages")


def instruction(record: Record) -> str:
    """Alpaca's instruction, and its input below if there is one."""
    extra = optional_field(record, "input", "")
    asked = text_field(record, "instruction")
    return f"{asked}\n\n{extra}" if extra.strip() else asked
