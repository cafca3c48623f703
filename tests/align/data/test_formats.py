from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats import FORMATS, read_record, to_record
from align.data.records import Tie, WrongKind
from align.data.rows import ChatRow, PreferenceRow, PromptRow, Row, TextRow
from tests.align.data.format_cases import (
    ASKED,
    BAD,
    CASES,
    CHAT,
    GOOD,
    HERE,
    HH,
    MBPP,
    PANDALM,
    QMSUM,
    SAID,
    SQUALITY,
    SVAMP,
    TULU,
    VOTES,
    assistant,
    user,
)


@pytest.mark.parametrize(("name", "kind", "record", "expected"), CASES)
def test_record_becomes_rows(name: str, kind: str, record: dict, expected: list[Row]):
    assert read_record(record, HERE, format_name=name, kind=kind) == expected
    # Found by its fields alone, it is the same.
    assert read_record(record, HERE, kind=kind) == expected


def test_every_format_has_a_case():
    assert {name for name, *_ in CASES} == set(FORMATS)


WORDS = st.text(min_size=1).filter(lambda text: bool(text.strip()))
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3).map(
    lambda turns: tuple(m for asked, said in turns for m in (user(asked), assistant(said)))
)
SHARE = st.floats(0, 1)
JSON = st.dictionaries(WORDS, st.lists(WORDS) | st.integers())


@given(
    st.one_of(
        st.builds(TextRow, WORDS, st.just(HERE)),
        st.builds(ChatRow, TURNS, st.just(HERE)),
        st.builds(
            PromptRow, TURNS.map(lambda m: m[:-1]), st.just(HERE), WORDS, WORDS, JSON, WORDS, SHARE
        ),
        st.builds(
            PreferenceRow,
            TURNS.map(lambda m: m[:-1]),
            st.just((GOOD,)),
            st.just((BAD, ASKED, GOOD)),
            st.just(HERE),
            WORDS,
            SHARE,
            st.floats(-5, 5),
        ),
    )
)
def test_rows_come_back_from_their_records(row: Row):
    assert read_record(to_record(row), HERE) == [row]


def test_format_that_gives_the_wanted_kind_itself_is_taken():
    record = {"instruction": "2+2?", "output": "4", "chosen": "5", "rejected": "5"}
    assert read_record(record, HERE, kind="chat") == [CHAT]


def test_signal_of_the_source_wins_over_the_rows():
    record = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "signal": "style"}
    (row,) = read_record(record, HERE, signal="correctness")
    assert row.signal == "correctness"


def test_share_gpt_leaves_its_record_as_it_was():
    record = {"conversations": [dict(SAID), {"from": "gpt", "value": "4"}]}
    read_record(record, HERE)
    assert record == {"conversations": [SAID, {"from": "gpt", "value": "4"}]}


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ("tie", Tie, "preference is a tie"),
        ("c-is-better", ValueError, "preference = 'c-is-better', expected tie"),
        ("a-is-best", ValueError, "preference = 'a-is-best', expected tie"),
    ],
)
def test_a_tulu_preference_that_names_no_winner(told: str, error: type, message: str):
    with pytest.raises(error, match=message):
        read_record({**TULU, "preference": told}, HERE, kind="preference")


@pytest.mark.parametrize("votes", [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 0, 0)])
def test_votes_without_a_winner_are_a_tie(votes: tuple[int, ...]):
    record = PANDALM | {f"annotator{n}": vote for n, vote in enumerate(votes, start=1)}
    with pytest.raises(Tie, match="have no winner"):
        read_record(record, HERE)


def messages(*turns: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


BROKEN: list[tuple[dict[str, Any] | list, str]] = [
    ([1], r"a row is list, expected a JSON object with fields"),
    ({"a": 1, "b": 2}, r"fields \['a', 'b'\] fit no format; set format to one of \['alpaca'"),
    ({"text": ""}, r"text is empty; give it text or drop the row"),
    ({"text": 3}, r"text is int 3, expected text"),
    ({"messages": []}, r"messages are \[\], expected a list of role and content"),
    ({"messages": "hi"}, r"messages are 'hi', expected a list of role and content"),
    (messages(assistant("4")), r"message 1 is assistant after the start; expected an optional sys"),
    (messages(ASKED, ASKED, GOOD), r"message 2 is user after user; expected an optional system"),
    (messages(ASKED, {"role": "system", "content": "x"}, GOOD), r"message 2 is system after user"),
    (messages(ASKED, {"role": "judge", "content": "x"}), r"message 2 has role 'judge', expected "),
    (messages(ASKED, {"content": "x"}), r"message 2 has role None, expected one of \['system'"),
    (messages(ASKED, assistant("  ")), r"message 2 \(assistant\) has content '  '; give it text"),
    (messages(ASKED, {"role": "assistant", "content": None}), r"\(assistant\) has content None"),
    (messages(ASKED), r"the last message is user's; expected the assistant's answer"),
    ({"prompt": [ASKED, GOOD]}, r"the last message is assistant's; expected one to be answered"),
    (messages(ASKED, GOOD) | {"label": False}, r"label is false: a bad answer without a good one"),
    ({"prompt": "2?", "chosen": "4", "rejected": "4"}, r"chosen and rejected are the same; drop"),
    ({"prompt": "2?", "chosen": "", "rejected": "4"}, r"chosen is empty; give it text or drop the"),
    ({"prompt": "2?", "chosen": "4", "rejected": 5}, r"5 is int, expected text or messages"),
    (
        {"prompt": "2?", "chosen": [ASKED], "rejected": [GOOD]},
        r"chosen: message 2 is user after user",
    ),
    ({"chosen": [], "rejected": [GOOD]}, r"chosen is empty, expected messages"),
    ({"chosen": [GOOD], "rejected": [BAD]}, r"prompt: messages are \[\], expected a list of role"),
    ({"prompt": "2?", "chosen": "4", "rejected": "5", "difficulty": 3}, r"difficulty = 3.0, expec"),
    ({"prompt": "2?", "difficulty": -1}, r"difficulty = -1.0, expected 0 easy to 1 hard"),
    ({"conversations": None}, r"conversations is NoneType, expected a list of messages"),
    ({"chosen": "4", "rejected": "5"}, r"chosen and rejected must be messages, or have a prompt b"),
    ({"prompt": "2?", "answer": 4}, r"answer = 4, expected str"),
    ({"prompt": "2?", "difficulty": "hard"}, r"difficulty = 'hard', expected float"),
    ({"prompt": "2?", "arguments": [1]}, r"arguments = \[1\], expected dict"),
    ({"question": "2?", "answer": "four"}, r"answer 'four' does not end in '#### number'"),
    ({"question": "2?", "answer": 4}, r"answer is int 4, expected text"),
    ({"question": "2?", "answer": []}, r"answer = \[\], expected a list of names"),
    (MBPP | {"test_list": "x"}, r"test_list = 'x', expected a list of Python texts"),
    (SVAMP | {"Answer": "51"}, r"Answer = '51', expected a number"),
    ({"problem": "x?", "answer": "0", "difficulty": 9}, r"difficulty = 9, expected a level from 1"),
    (PANDALM | VOTES | {"annotator3": 4}, r"annotator1 to 3 are \[1, 1, 4\], expected 0 \(tie\)"),
    ({"input": "a", "output_1": "b", "output_2": "c", "label": 0}, r"label = 0, expected 1 or 2"),
    (
        {"prompt": "x", "instruction_id_list": ["a"], "kwargs": []},
        r"instruction_id_list and kwargs must be lists of the same length",
    ),
    (QMSUM | {"general_query_list": None}, r"general_query_list is NoneType, expected a list of o"),
    (QMSUM | {"general_query_list": [{"query": "a"}]}, r"no field answer; found \['query'\]"),
    (
        SQUALITY | {"questions": [{"question_text": "When?", "responses": []}]},
        r"question 'When\?' has no responses",
    ),
    ({"chosen": "x\n\nHuman: a", "rejected": "b"}, r"transcript starts with 'x', expected "),
    (HH | {"rejected": HH["chosen"]}, r"chosen and rejected are the same; drop the row"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_broken_record_says_what_is_wrong(record: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_record(record, HERE)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats()
    | st.sampled_from(["", "a", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "query"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([(name, kind, record) for name, kind, record, _ in CASES]), st.data())
def test_anything_in_a_field_gives_rows_or_one_clear_error(case, data):
    name, kind, record = case
    field = data.draw(st.sampled_from(sorted(record)))
    changed = record | {field: data.draw(ANYTHING)}
    try:
        told: object = read_record(changed, HERE, format_name=name, kind=kind)
    except ValueError as error:
        told = str(error)
    assert told
    assert isinstance(told, list) or "\n" not in told


def test_unknown_format_lists_the_table():
    with pytest.raises(ValueError, match=r"format = 'gsm', expected auto or one of \['alpaca', "):
        read_record({"text": "a"}, HERE, format_name="gsm")


def test_missing_field_of_a_named_format_is_told_with_those_found():
    with pytest.raises(ValueError, match=r"format gsm8k needs answer; found fields \['question'\]"):
        read_record({"question": "2?"}, HERE, format_name="gsm8k")


def test_kind_that_cannot_be_made_is_refused():
    with pytest.raises(WrongKind, match="no preference row can be made of a TextRow; take another"):
        read_record({"text": "a"}, HERE, kind="preference")
