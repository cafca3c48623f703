from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats import FORMATS, read_record, to_record
from align.data.records import Tie, WrongKind
from align.data.rows import ChatRow, Origin, PreferenceRow, PromptRow, Row, TextRow
from reward.types import Message

HERE = Origin("rows.jsonl:7", "rows", "MIT")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


ASKED, GOOD, BAD = user("2+2?"), assistant("4"), assistant("5")
CHAT = ChatRow((ASKED, GOOD), HERE)
PAIR = PreferenceRow((ASKED,), (GOOD,), (BAD,), HERE)
SAID = {"from": "human", "value": "2+2?"}
GSM8K = {
    "question": "He sold 48 clips, then half. How many?",
    "answer": "Half is 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 1,072",
}
SVAMP = {"Body": "A pack costs 76 dollars", "Question": "How much?", "Answer": 51.0, "ID": "1"}
PANDALM = {"idx": 0, "instruction": "Add.", "input": "2+2", "response1": "4", "response2": "5"}
TULU = {"prompt": "2+2?", "completion_a": "5", "completion_b": "4"}
VOTES = {"annotator1": 1, "annotator2": 1, "annotator3": 2}
QMSUM = {
    "meeting_transcripts": [
        {"speaker": "Ann", "content": "We start."},
        {"speaker": "Bob", "content": "We end."},
    ],
    "general_query_list": [{"query": "What happened?", "answer": "A meeting."}],
    "specific_query_list": [{"query": "Who ended?", "answer": "Bob.", "relevant_text_span": []}],
}
SQUALITY = {
    "document": "Once.",
    "questions": [
        {
            "question_text": "When?",
            "responses": [{"response_text": "Once."}, {"response_text": "Long ago."}],
        }
    ],
}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant: 4",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant: 5",
}
NIAH = [user("a poem"), assistant("Roses"), user("Repeat the poem.")]


def problem(answer: str, question: str, difficulty: float) -> PromptRow:
    return PromptRow(
        (user(question),), HERE, answer, "math", {}, task="math", difficulty=difficulty
    )


MBPP = {
    "task_id": 1,
    "text": "Square a number.",
    "code": "def square(n):\r\n  return n * n\r\n",
    "test_setup_code": "x = 2",
    "test_list": ["assert square(x) == 4", "assert square(3) == 9"],
}
MBPP_ASKED = user(
    "Square a number.\nYour code must pass these tests:\n"
    "```python\nassert square(x) == 4\nassert square(3) == 9\n```"
)
HEAD = 'def square(n):\n    """The square."""\n'
CHECK = "def check(candidate):\n    assert candidate(2) == 4"
HUMANEVAL = {"task_id": "0", "prompt": HEAD, "entry_point": "square", "test": CHECK}
NQ_OPEN = {"question": "when was it", "answer": ["14 December 1972", "1972"]}
CASES: list[tuple[str, str, dict[str, Any], list[Row]]] = [
    ("text", "auto", {"text": "Once.", "id": 3}, [TextRow("Once.", HERE)]),
    ("chat", "auto", {"messages": [ASKED, GOOD]}, [CHAT]),
    ("chat", "prompt", {"messages": [ASKED, GOOD]}, [PromptRow((ASKED,), HERE, answer="4")]),
    (
        "chat",
        "prompt",
        {"messages": [ASKED], "answer": "4", "verifier": "math"},
        [PromptRow((ASKED,), HERE, answer="4", verifier="math")],
    ),
    ("share_gpt", "auto", {"conversations": [SAID, {"from": "gpt", "value": "4"}]}, [CHAT]),
    (
        "share_gpt_preference",
        "auto",
        {
            "conversations": [SAID],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        [PAIR],
    ),
    ("preference", "auto", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, [PAIR]),
    ("preference", "auto", {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, [PAIR]),
    ("preference", "auto", {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, [PAIR]),
    ("preference", "chat", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, [CHAT]),
    (
        "preference",
        "prompt",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        [PromptRow((ASKED,), HERE)],
    ),
    (
        "preference",
        "auto",
        {
            "prompt": "2+2?",
            "chosen": "4",
            "rejected": "5",
            "signal": "style",
            "difficulty": 1,
            "margin": 0.5,
        },
        [PreferenceRow((ASKED,), (GOOD,), (BAD,), HERE, "style", 1.0, 0.5)],
    ),
    (
        "hh",
        "auto",
        HH,
        [PreferenceRow((user("hi"), assistant("hello"), ASKED), (GOOD,), (BAD,), HERE)],
    ),
    ("prompt_completion", "auto", {"prompt": "2+2?", "completion": "4"}, [CHAT]),
    ("prompt_completion", "auto", {"prompt": [ASKED], "completion": [GOOD]}, [CHAT]),
    ("prompt", "auto", {"prompt": "2+2?"}, [PromptRow((ASKED,), HERE)]),
    (
        "prompt",
        "auto",
        {
            "prompt": [ASKED],
            "answer": "4",
            "verifier": "math",
            "arguments": {"a": [1]},
            "task": "sum",
            "difficulty": 0.25,
        },
        [PromptRow((ASKED,), HERE, "4", "math", {"a": [1]}, "sum", 0.25)],
    ),
    ("alpaca", "auto", {"instruction": "2+2?", "input": "", "output": "4"}, [CHAT]),
    (
        "alpaca",
        "auto",
        {"instruction": "Add.", "input": "2+2", "response": "4"},
        [ChatRow((user("Add.\n\n2+2"), GOOD), HERE)],
    ),
    (
        "alpaca_preference",
        "auto",
        {"instruction": "2+2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"},
        [PAIR],
    ),
    (
        "gsm8k",
        "chat",
        GSM8K,
        [
            ChatRow(
                (
                    user(GSM8K["question"]),
                    assistant("Half is 48/2 = 24.\nIn all 48+24 = 72.\n#### 1,072"),
                ),
                HERE,
            )
        ],
    ),
    (
        "mbpp",
        "auto",
        MBPP,
        [
            PromptRow(
                (MBPP_ASKED,),
                HERE,
                verifier="code",
                arguments={"tests": MBPP["test_list"], "setup": "x = 2"},
                task="mbpp",
            )
        ],
    ),
    (
        "mbpp",
        "chat",
        MBPP,
        [ChatRow((MBPP_ASKED, assistant("```python\ndef square(n):\n  return n * n\n```")), HERE)],
    ),
    (
        "humaneval",
        "auto",
        HUMANEVAL,
        [
            PromptRow(
                (user(f"Complete this function.\n```python\n{HEAD.rstrip()}\n```"),),
                HERE,
                verifier="code",
                arguments={
                    "tests": [f"{CHECK}\n\ncheck(square)\n"],
                    "prefix": HEAD,
                    "entry_point": "square",
                },
                task="humaneval",
            )
        ],
    ),
    (
        "nq_open",
        "auto",
        NQ_OPEN,
        [
            PromptRow(
                (user("when was it?"),),
                HERE,
                "14 December 1972",
                "facts",
                {"answers": NQ_OPEN["answer"]},
                "nq_open",
            )
        ],
    ),
    ("gsm8k", "prompt", GSM8K, [problem("1072", GSM8K["question"], 0.25)]),
    ("svamp", "prompt", SVAMP, [problem("51", "A pack costs 76 dollars. How much?", 0.1)]),
    (
        "svamp",
        "auto",
        {**SVAMP, "Answer": 0.5},
        [ChatRow((user("A pack costs 76 dollars. How much?"), assistant("0.5")), HERE)],
    ),
    ("math", "auto", {"problem": "x?", "answer": "0", "difficulty": 5.0}, [problem("0", "x?", 1)]),
    (
        "pandalm",
        "auto",
        {**PANDALM, **VOTES},
        [
            PreferenceRow(
                (user("Add.\n\n2+2"),),
                (GOOD,),
                (BAD,),
                HERE,
                difficulty=pytest.approx(2 / 3),
                margin=pytest.approx(1 / 3),
            )
        ],
    ),
    (
        "pandalm",
        "auto",
        {**PANDALM, "annotator1": 2, "annotator2": 2, "annotator3": 2},
        [PreferenceRow((user("Add.\n\n2+2"),), (BAD,), (GOOD,), HERE, difficulty=0.0, margin=1.0)],
    ),
    (
        "tulu",
        "preference",
        {**TULU, "preference": "b-is-slightly-better"},
        [PreferenceRow((user("2+2?"),), (GOOD,), (BAD,), HERE, difficulty=0.75, margin=0.5)],
    ),
    ("llmbar", "auto", {"input": "2+2?", "output_1": "5", "output_2": "4", "label": 2}, [PAIR]),
    (
        "ifeval",
        "auto",
        {
            "prompt": "Shout.",
            "instruction_id_list": ["change_case:english_capital"],
            "kwargs": [{"num_words": None}],
        },
        [
            PromptRow(
                (user("Shout."),),
                HERE,
                verifier="constraints",
                arguments={"instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
                task="ifeval",
            )
        ],
    ),
    (
        "mr_niah",
        "prompt",
        {"messages": NIAH, "label": "Roses", "length_class": 2048},
        [
            PromptRow(
                tuple(NIAH), HERE, "Roses", "retrieval", {"answers": ["Roses"]}, task="mr_niah"
            )
        ],
    ),
    (
        "qmsum",
        "chat",
        QMSUM,
        [
            ChatRow((user(f"Ann: We start.\nBob: We end.\n\n{q}"), assistant(a)), HERE)
            for q, a in (("What happened?", "A meeting."), ("Who ended?", "Bob."))
        ],
    ),
    (
        "squality",
        "chat",
        SQUALITY,
        [
            ChatRow((user("Once.\n\nWhen?"), assistant(answer)), HERE)
            for answer in ("Once.", "Long ago.")
        ],
    ),
    (
        "squality",
        "prompt",
        SQUALITY,
        [PromptRow((user("Once.\n\nWhen?"),), HERE, answer="Once.")],
    ),
]


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
