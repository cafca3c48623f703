"""Records in every format of `align.data.formats`, and the rows that they become."""

from __future__ import annotations

from typing import Any

import pytest

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
