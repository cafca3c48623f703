"""Records of a file to rows: one table of formats, found by the fields that a record has.

An adapter reads one record (a JSON object) and gives its rows or a ValueError that says what is
wrong with it; the reader adds the place. What a format does not give directly is derived where it
can be: a chat from the chosen answer of a preference, a prompt from a chat.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data_utils import extract_prompt, maybe_convert_to_chatml

from align.data import benchmarks
from align.data.records import (
    Kind,
    Reading,
    Record,
    WrongKind,
    assistant,
    check_messages,
    difficulty_field,
    instruction,
    message_list,
    optional_field,
    preference,
    text_field,
    turns,
    user,
)
from align.data.rows import ChatRow, Origin, PreferenceRow, PromptRow, Row, TextRow

SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Format:
    """One form of record.

    Args:
        fields: all of these are there; a tuple inside means one of them.
        kinds: kinds of row that it gives, the first if none is asked for.
        adapt: record to rows.
        only_if: a further test, where the fields alone do not tell.
    """

    fields: tuple[str | tuple[str, ...], ...]
    kinds: tuple[str, ...]
    adapt: Callable[[Record, Reading], list[Row]]
    only_if: Callable[[Record], bool] = lambda record: True

    def matches(self, record: Record) -> bool:
        there = all(
            any(name in record for name in (names if isinstance(names, tuple) else (names,)))
            for names in self.fields
        )
        return there and self.only_if(record)


def read_record(
    record: object,
    origin: Origin,
    *,
    format_name: str = "auto",
    kind: Kind = "auto",
    signal: str = "",
) -> list[Row]:
    """The rows of one record.

    Args:
        record: a JSON object.
        origin: given to every row.
        format_name: a key of `FORMATS`, or "auto" to find it by the fields.
        kind: kind of row that is wanted; "auto" takes the format's first.
        signal: reward signal that a preference speaks about; "" leaves it to the record.

    Raises:
        ValueError: saying what is wrong with the record, without the place.
        Tie: if it is a comparison that nobody won.
        WrongKind: if the format gives no row of that kind.

    Example:
        >>> rows = read_record({"text": "Once."}, Origin("a.jsonl:1"))
        >>> rows[0].text
        'Once.'
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a row is {type(record).__name__}, expected a JSON object with fields")
    chosen = _format(record, format_name, kind)
    wanted = chosen.kinds[0] if kind == "auto" else kind
    native = wanted if wanted in chosen.kinds else chosen.kinds[0]
    rows = chosen.adapt(record, Reading(origin, native, signal))
    if not rows:
        raise ValueError("the record's lists are empty, so it gives no row")
    return [derive(row, wanted) for row in rows]


def derive(row: Row, kind: str) -> Row:
    """The row as another kind: chat from preference, prompt from preference or chat.

    Raises:
        WrongKind: if that kind cannot be made of it.
    """
    if isinstance(row, KINDS[kind]):
        return row
    if kind == "chat" and isinstance(row, PreferenceRow):
        return ChatRow((*row.prompt, *row.chosen), row.origin)
    if kind == "prompt" and isinstance(row, PreferenceRow):
        return PromptRow(row.prompt, row.origin, difficulty=row.difficulty)
    if kind == "prompt" and isinstance(row, ChatRow):
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        return PromptRow(row.messages[:last], row.origin, answer=row.messages[last]["content"])
    raise WrongKind(
        f"no {kind} row can be made of a {type(row).__name__}; take another source or set `as`"
    )


def to_record(row: Row) -> dict[str, Any]:
    """The row as a JSON object that `read_record` reads back.

    Example:
        >>> to_record(TextRow("Once.", Origin("a.jsonl:1")))
        {'text': 'Once.'}
    """
    if isinstance(row, TextRow):
        return {"text": row.text}
    if isinstance(row, ChatRow):
        return {"messages": list(row.messages)}
    if isinstance(row, PreferenceRow):
        return {
            "prompt": list(row.prompt),
            "chosen": list(row.chosen),
            "rejected": list(row.rejected),
            "signal": row.signal,
            "difficulty": row.difficulty,
            "margin": row.margin,
            **_judged(row),
        }
    return {
        "prompt": list(row.prompt),
        "answer": row.answer,
        "verifier": row.verifier,
        "arguments": dict(row.arguments),
        "task": row.task,
        "difficulty": row.difficulty,
    }


def _judged(row: PreferenceRow) -> dict[str, Any]:
    """How a rule judges the answers, where one does."""
    if not row.verifier:
        return {}
    return {"answer": row.answer, "verifier": row.verifier, "arguments": dict(row.arguments)}


def _format(record: Record, name: str, kind: Kind) -> Format:
    """The format of that name; or of those that match, the first that gives this kind itself."""
    if name != "auto":
        if name not in FORMATS:
            raise ValueError(f"format = {name!r}, expected auto or one of {sorted(FORMATS)}")
        chosen = FORMATS[name]
        missing = [str(f) for f in chosen.fields if not Format((f,), (), _text).matches(record)]
        if missing:
            raise ValueError(
                f"format {name} needs {', '.join(missing)}; found fields {sorted(record)}"
            )
        return chosen
    found = [known for known in FORMATS.values() if known.matches(record)]
    if not found:
        raise ValueError(
            f"fields {sorted(record)} fit no format; set format to one of {sorted(FORMATS)} "
            "or rename the fields"
        )
    return next((known for known in found if kind in known.kinds), found[0])


def _text(record: Record, reading: Reading) -> list[Row]:
    return [TextRow(text_field(record, "text"), reading.origin)]


def _chat(record: Record, reading: Reading) -> list[Row]:
    """Messages; a prompt may also stop before the answer, which is then the field answer."""
    if record.get("label") is False:
        raise ValueError("label is false: a bad answer without a good one cannot be trained on")
    messages = record["messages"]
    if reading.kind == "prompt" and not _is_answered(messages):
        return _prompt({**record, "prompt": messages}, reading)
    return [ChatRow(check_messages(messages, answered=True), reading.origin)]


def _is_answered(messages: object) -> bool:
    """Whether the last message is the assistant's; broken ones are left to the checks."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        return False
    return messages[-1].get("role") == "assistant"


def _share_gpt(record: Record, reading: Reading) -> list[Row]:
    """from/value messages; chosen and rejected may be one message each."""
    plain: dict[str, Any] = {"conversations": message_list(record, "conversations")}
    for name in ("chosen", "rejected"):
        if name in record:
            one = record[name]
            plain[name] = [one] if isinstance(one, Mapping) else message_list(record, name)
    plain = maybe_convert_to_chatml(copy.deepcopy(plain))
    for messages in plain.values():
        for message in messages:
            message["role"] = SPEAKERS.get(str(message.get("role")), message.get("role"))
    if "chosen" not in plain:
        return _chat(plain, reading)
    return [preference(plain["messages"], plain["chosen"], plain["rejected"], reading)]


def _preference(record: Record, reading: Reading) -> list[Row]:
    """TRL's forms: text or messages, the prompt given or common to both."""
    if "prompt" not in record:
        if not all(isinstance(record[name], list) for name in ("chosen", "rejected")):
            raise ValueError("chosen and rejected must be messages, or have a prompt beside them")
        sides: dict[str, Sequence[Any]] = {
            name: message_list(record, name) for name in ("chosen", "rejected")
        }
        if sides["chosen"] == sides["rejected"]:
            raise ValueError("chosen and rejected are the same; drop the row")
        record = {**record, **extract_prompt(sides)}
    prompt = turns(record["prompt"], "user")
    row = preference(prompt, record["chosen"], record["rejected"], reading, record=record)
    return [row]


def _completion(record: Record, reading: Reading) -> list[Row]:
    messages = [*turns(record["prompt"], "user"), *turns(record["completion"], "assistant")]
    return [ChatRow(check_messages(messages, answered=True), reading.origin)]


def _prompt(record: Record, reading: Reading) -> list[Row]:
    return [
        PromptRow(
            check_messages(turns(record["prompt"], "user"), answered=False),
            reading.origin,
            answer=optional_field(record, "answer", ""),
            verifier=optional_field(record, "verifier", ""),
            arguments=optional_field(record, "arguments", {}),
            task=optional_field(record, "task", ""),
            difficulty=difficulty_field(record),
        )
    ]


def _hh(record: Record, reading: Reading) -> list[Row]:
    """Two transcripts that share their beginning."""
    sides: dict[str, Sequence[Any]] = {
        name: _transcript(text_field(record, name)) for name in ("chosen", "rejected")
    }
    if sides["chosen"] == sides["rejected"]:
        raise ValueError("chosen and rejected are the same; drop the row")
    parts = extract_prompt(sides)
    return [preference(parts["prompt"], parts["chosen"], parts["rejected"], reading)]


def _transcript(text: str) -> list[dict[str, str]]:
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if pieces[0].strip():
        raise ValueError(f"transcript starts with {pieces[0]!r:.40}, expected '\\n\\nHuman:'")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": speakers[who], "content": said.strip()}
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _is_transcript(record: Record) -> bool:
    chosen = record["chosen"]
    return "prompt" not in record and isinstance(chosen, str) and "\n\nHuman:" in chosen


def _alpaca_chat(record: Record, reading: Reading) -> list[Row]:
    answer = text_field(record, "output", "response")
    return [ChatRow((user(instruction(record)), assistant(answer)), reading.origin)]


def _alpaca_preference(record: Record, reading: Reading) -> list[Row]:
    prompt = [user(instruction(record))]
    chosen, rejected = text_field(record, "chosen"), text_field(record, "rejected")
    return [preference(prompt, chosen, rejected, reading, record=record)]


KINDS: dict[str, type] = {
    "chat": ChatRow,
    "preference": PreferenceRow,
    "prompt": PromptRow,
    "text": TextRow,
}

# The first that matches is taken, so the more particular stand before the more general.
FORMATS: dict[str, Format] = {
    "share_gpt_preference": Format(
        ("conversations", "chosen", "rejected"), ("preference",), _share_gpt
    ),
    "share_gpt": Format(("conversations",), ("chat",), _share_gpt),
    "hh": Format(("chosen", "rejected"), ("preference",), _hh, _is_transcript),
    "alpaca_preference": Format(
        ("instruction", "chosen", "rejected"), ("preference",), _alpaca_preference
    ),
    "preference": Format(("chosen", "rejected"), ("preference",), _preference),
    "mr_niah": Format(("messages", "label", "length_class"), ("prompt",), benchmarks.mr_niah),
    "chat": Format(("messages",), ("chat", "prompt"), _chat),
    "pandalm": Format(
        ("instruction", "response1", "response2", "annotator1"), ("preference",), benchmarks.pandalm
    ),
    "llmbar": Format(
        ("input", "output_1", "output_2", "label"), ("preference",), benchmarks.llmbar
    ),
    "tulu": Format(
        ("prompt", "completion_a", "completion_b", "preference"), ("preference",), benchmarks.tulu
    ),
    "alpaca": Format(("instruction", ("output", "response")), ("chat",), _alpaca_chat),
    "ifeval": Format(("prompt", "instruction_id_list", "kwargs"), ("prompt",), benchmarks.ifeval),
    "humaneval": Format(("prompt", "test", "entry_point"), ("prompt",), benchmarks.humaneval),
    "mbpp": Format(("text", "code", "test_list"), ("prompt", "chat"), benchmarks.mbpp),
    "nq_open": Format(
        ("question", "answer"),
        ("prompt",),
        benchmarks.nq_open,
        lambda record: isinstance(record["answer"], list),
    ),
    "prompt_completion": Format(("prompt", "completion"), ("chat",), _completion),
    "gsm8k": Format(
        ("question", "answer"),
        ("chat", "prompt"),
        benchmarks.gsm8k,
        lambda record: not isinstance(record["answer"], list),
    ),
    "math": Format(("problem", "answer"), ("prompt",), benchmarks.math),
    "svamp": Format(("Body", "Question", "Answer"), ("chat", "prompt"), benchmarks.svamp),
    "qmsum": Format(("meeting_transcripts",), ("chat", "prompt"), benchmarks.qmsum),
    "squality": Format(("document", "questions"), ("chat", "prompt"), benchmarks.squality),
    "prompt": Format(("prompt",), ("prompt",), _prompt),
    "text": Format(("text",), ("text",), _text),
}
