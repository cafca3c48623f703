"""Adapters of published datasets: their own fields to our rows.

What is changed on the way, and why, stands in each docstring; nothing else is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from align.data.records import (
    Reading,
    Record,
    Tie,
    assistant,
    check_messages,
    instruction,
    optional_field,
    preference,
    text_field,
    user,
)
from align.data.rows import ChatRow, PromptRow, Row
from reward.types import Message

# GSM8K's hardest problems take about this many steps.
GSM8K_STEPS = 8


def gsm8k(record: Record, reading: Reading) -> list[Row]:
    """Question and worked answer; the calculator notes <<48/2=24>> are taken out of the answer.

    The final number after "####" is the reference, without its thousands commas; difficulty is
    the number of calculations, 8 and more being 1.
    """
    question, answer = text_field(record, "question"), text_field(record, "answer")
    found = re.search(r"####\s*(\S.*?)\s*$", answer)
    if not found:
        raise ValueError(f"answer {answer[-40:]!r} does not end in '#### number'")
    steps = len(re.findall(r"<<.*?>>", answer))
    shown = re.sub(r"<<.*?>>", "", answer)
    final = found[1].replace(",", "")
    return _problem(question, shown, final, min(steps / GSM8K_STEPS, 1.0), reading)


def svamp(record: Record, reading: Reading) -> list[Row]:
    """Story and question in one prompt; a whole number is written without its ".0"."""
    story, question = text_field(record, "Body"), text_field(record, "Question")
    value = record["Answer"]
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"Answer = {value!r:.40}, expected a number")
    answer = str(int(value)) if float(value).is_integer() else str(value)
    stop = "" if story.rstrip().endswith((".", "?", "!")) else "."
    return _problem(f"{story.rstrip()}{stop} {question}", answer, answer, 0.1, reading)


def math(record: Record, reading: Reading) -> list[Row]:
    """Problem and final answer; levels 1 to 5 become difficulty 0 to 1."""
    level = record.get("difficulty", 3)
    if not isinstance(level, int | float) or not 1 <= level <= 5:
        raise ValueError(f"difficulty = {level!r:.40}, expected a level from 1 to 5")
    problem, answer = text_field(record, "problem"), text_field(record, "answer")
    return _problem(problem, answer, answer, (level - 1) / 4, reading)


def pandalm(record: Record, reading: Reading) -> list[Row]:
    """Two responses and three people's votes (1, 2, or 0 for a tie).

    Most votes win; margin is the share of votes by which the winner is ahead of the other
    response, and difficulty one minus that. Three people who do not agree on a winner are a tie.
    """
    votes = [record.get(f"annotator{number}") for number in (1, 2, 3)]
    if any(vote not in (0, 1, 2) for vote in votes):
        raise ValueError(f"annotator1 to 3 are {votes}, expected 0 (tie), 1 or 2 each")
    first, second = votes.count(1), votes.count(2)
    if first == second or votes.count(0) > max(first, second):
        raise Tie(f"votes {votes} have no winner")
    sides = (text_field(record, "response1"), text_field(record, "response2"))
    chosen, rejected = sides if first > second else sides[::-1]
    margin = abs(first - second) / len(votes)
    prompt = [user(instruction(record))]
    row = preference(prompt, chosen, rejected, reading, margin=margin, difficulty=1 - margin)
    return [row]


def llmbar(record: Record, reading: Reading) -> list[Row]:
    """Two outputs; label 1 or 2 names the better one."""
    sides = (text_field(record, "output_1"), text_field(record, "output_2"))
    if record["label"] not in (1, 2):
        raise ValueError(f"label = {record['label']!r:.40}, expected 1 or 2")
    chosen, rejected = sides if record["label"] == 1 else sides[::-1]
    return [preference([user(text_field(record, "input"))], chosen, rejected, reading)]


# Of the winner's lead: how sure the evaluator was.
TULU_MARGINS = {"is-better": 1.0, "is-slightly-better": 0.5}


def tulu(record: Record, reading: Reading) -> list[Row]:
    """Two completions and one person's preference in five degrees.

    "Slightly" is half the margin of "better"; difficulty is one minus half the margin, because one
    person's clear word is still one person's.
    """
    told = text_field(record, "preference")
    if told == "tie":
        raise Tie("preference is a tie")
    winner, _, degree = told.partition("-")
    if winner not in ("a", "b") or degree not in TULU_MARGINS:
        raise ValueError(
            f"preference = {told!r:.40}, expected tie, or a- or b- with {' or '.join(TULU_MARGINS)}"
        )
    sides = (text_field(record, "completion_a"), text_field(record, "completion_b"))
    chosen, rejected = sides if winner == "a" else sides[::-1]
    margin = TULU_MARGINS[degree]
    prompt = [user(text_field(record, "prompt"))]
    row = preference(prompt, chosen, rejected, reading, margin=margin, difficulty=1 - margin / 2)
    return [row]


def ifeval(record: Record, reading: Reading) -> list[Row]:
    """Prompt with instruction ids and arguments; arguments that are null are left out."""
    names, kwargs = record["instruction_id_list"], _mappings(record, "kwargs")
    if not isinstance(names, list) or len(names) != len(kwargs):
        raise ValueError("instruction_id_list and kwargs must be lists of the same length")
    given = [{key: value for key, value in each.items() if value is not None} for each in kwargs]
    return [
        PromptRow(
            (user(text_field(record, "prompt")),),
            reading.origin,
            verifier="constraints",
            arguments={"instruction_id_list": names, "kwargs": given},
            task="ifeval",
        )
    ]


def mbpp(record: Record, reading: Reading) -> list[Row]:
    """Task with its tests in the prompt (they alone name the function), or with the solution."""
    task, tests = text_field(record, "text"), record["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise ValueError(f"test_list = {tests!r:.60}, expected a list of Python texts")
    shown = "\n".join(tests)
    prompt = user(f"{task}\nYour code must pass these tests:\n```python\n{shown}\n```")
    if reading.kind == "chat":
        code = text_field(record, "code").replace("\r\n", "\n").strip()
        return [ChatRow((prompt, assistant(f"```python\n{code}\n```")), reading.origin)]
    arguments = {"tests": tests, "setup": optional_field(record, "test_setup_code", "")}
    return [_program((prompt,), arguments, "mbpp", reading)]


def humaneval(record: Record, reading: Reading) -> list[Row]:
    """A function's head to be completed; its tests are the asserts of `check`."""
    head, entry_point = text_field(record, "prompt"), text_field(record, "entry_point")
    test = f"{text_field(record, 'test')}\n\ncheck({entry_point})\n"
    arguments = {"tests": [test], "prefix": head, "entry_point": entry_point}
    prompt = user(f"Complete this function.\n```python\n{head.rstrip()}\n```")
    return [_program((prompt,), arguments, "humaneval", reading)]


def nq_open(record: Record, reading: Reading) -> list[Row]:
    """Question with the names of its answer; the first is the reference."""
    names = record["answer"]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"answer = {names!r:.60}, expected a list of names")
    prompt = (user(f"{text_field(record, 'question')}?"),)
    return [
        PromptRow(
            prompt,
            reading.origin,
            answer=names[0],
            verifier="facts",
            arguments={"answers": names},
            task="nq_open",
        )
    ]


def mr_niah(record: Record, reading: Reading) -> list[Row]:
    """A long conversation that ends by asking for an earlier answer, which is the reference."""
    label = text_field(record, "label")
    return [
        PromptRow(
            check_messages(record["messages"], answered=False),
            reading.origin,
            answer=label,
            verifier="retrieval",
            arguments={"answers": [label]},
            task="mr_niah",
        )
    ]


def qmsum(record: Record, reading: Reading) -> list[Row]:
    """One row for each general and specific query; the whole transcript stands before it."""
    turns = _mappings(record, "meeting_transcripts")
    transcript = "\n".join(f"{text_field(t, 'speaker')}: {t.get('content', '')}" for t in turns)
    queries = [
        query
        for name in ("general_query_list", "specific_query_list")
        for query in _mappings(record, name)
    ]
    return [
        _grounded(transcript, text_field(query, "query"), text_field(query, "answer"), reading)
        for query in queries
    ]


def squality(record: Record, reading: Reading) -> list[Row]:
    """One chat for each of a question's answers, or one prompt with the first as reference."""
    document = text_field(record, "document")
    rows: list[Row] = []
    for question in _mappings(record, "questions"):
        asked = text_field(question, "question_text")
        answers = [text_field(each, "response_text") for each in _mappings(question, "responses")]
        if not answers:
            raise ValueError(f"question {asked!r:.40} has no responses")
        used = answers if reading.kind == "chat" else answers[:1]
        rows.extend(_grounded(document, asked, answer, reading) for answer in used)
    return rows


def _program(
    prompt: tuple[Message, ...], arguments: dict[str, Any], task: str, reading: Reading
) -> PromptRow:
    return PromptRow(prompt, reading.origin, verifier="code", arguments=arguments, task=task)


def _problem(
    question: str, response: str, answer: str, difficulty: float, reading: Reading
) -> list[Row]:
    if reading.kind == "chat":
        return [ChatRow((user(question), assistant(response)), reading.origin)]
    return [
        PromptRow(
            (user(question),),
            reading.origin,
            answer=answer,
            verifier="math",
            task="math",
            difficulty=difficulty,
        )
    ]


def _grounded(document: str, question: str, answer: str, reading: Reading) -> Row:
    prompt = user(f"{document}\n\n{question}")
    if reading.kind == "chat":
        return ChatRow((prompt, assistant(answer)), reading.origin)
    return PromptRow((prompt,), reading.origin, answer=answer)


def _mappings(record: Record, name: str) -> list[Mapping[str, Any]]:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{name} is {type(value).__name__}, expected a list of objects")
    return value
