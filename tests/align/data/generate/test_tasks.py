from __future__ import annotations

import re
from collections import Counter
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from align.data.batch import Example
from align.data.generate import TASKS, WAYS, Problem
from align.data.generate.lexicon import ANIMALS, COLOURS, NAMES, OBJECTS, count_pieces
from align.data.render import render_chat, render_preference
from align.data.sources import prompt_text, split_of
from reward.types import Verdict
from reward.verifiers import verify

EVERY = pytest.mark.parametrize("name", sorted(TASKS))
WITH_CONTEXT = sorted(name for name, task in TASKS.items() if task.has_context)
WITHOUT_CONTEXT = sorted(set(TASKS) - set(WITH_CONTEXT))


def judged(problem: Problem, response: str) -> Verdict:
    verdict = verify(problem.prompt_row().item(response))
    assert verdict.valid, verdict.reason
    return verdict


@EVERY
@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 99), level=st.floats(0, 1))
def test_gold_response_is_right_and_wrong_ones_are_wrong(
    name: str, index: int, seed: int, level: float
):
    problem = TASKS[name].problem(index, seed=seed, difficulty=(level, level))
    assert judged(problem, problem.response).value == 1.0
    for way, response in problem.wrong.items():
        if WAYS[way].signal != "style":
            assert judged(problem, response).value < 1.0, (way, problem)


@EVERY
def test_same_arguments_give_the_same_problem_and_others_another(name: str):
    task = TASKS[name]
    assert task.problem(5, seed=2) == task.problem(5, seed=2)
    questions = {task.problem(index, seed=seed).question for index in range(20) for seed in (0, 1)}
    assert len(questions) >= 36


@EVERY
def test_problems_have_only_the_ways_that_the_task_names(name: str):
    seen = {way for index in range(200) for way in TASKS[name].problem(index).wrong}
    assert seen == set(TASKS[name].ways)
    assert seen <= set(WAYS)


@EVERY
def test_difficulty_is_drawn_from_its_range(name: str):
    drawn = [TASKS[name].problem(i, difficulty=(0.2, 0.4)).difficulty for i in range(200)]
    assert 0.2 <= min(drawn) < 0.22
    assert 0.38 < max(drawn) <= 0.4


@EVERY
def test_harder_problems_are_longer(name: str):
    def length(level: float) -> float:
        problems = [TASKS[name].problem(i, difficulty=(level, level)) for i in range(100)]
        return mean(count_pieces(f"{each.question} {each.response}") for each in problems)

    lengths = [length(level) for level in (0.0, 0.5, 1.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]


@EVERY
def test_short_problems_fit_in_a_small_context(name: str, tokenizer: PreTrainedTokenizerFast):
    sizes = [
        len(render_chat(TASKS[name].problem(i).chat_row(), tokenizer).tokens) for i in range(200)
    ]
    assert max(sizes) <= 160
    easy = [TASKS[name].problem(i, difficulty=(0, 0)) for i in range(200)]
    assert max(len(render_chat(each.chat_row(), tokenizer).tokens) for each in easy) <= 64
    assert max(len(tokenizer.encode(each.response)) for each in easy) <= 16


@pytest.mark.parametrize("name", WITH_CONTEXT)
@pytest.mark.parametrize("size", [256, 512, 2048])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_context_fills_the_wanted_tokens_and_no_more(
    name: str, size: int, level: float, tokenizer: PreTrainedTokenizerFast
):
    for index in range(20):
        problem = TASKS[name].problem(index, difficulty=(level, level), context_tokens=size)
        length = len(render_chat(problem.chat_row(), tokenizer).tokens)
        assert 0.93 * size <= length <= size
        assert judged(problem, problem.response).value == 1.0


def test_needle_stands_anywhere_in_the_context():
    def depth(index: int) -> float:
        problem = TASKS["needle"].problem(index, difficulty=(0, 0), context_tokens=1000)
        return problem.question.index(problem.response) / len(problem.question)

    depths = [depth(index) for index in range(200)]
    quarters = Counter(int(4 * each) for each in depths)
    assert all(30 <= quarters[quarter] <= 70 for quarter in range(4))


def test_needle_is_said_once_and_others_keep_other_things():
    for index in range(100):
        problem = TASKS["needle"].problem(index, difficulty=(1, 1))
        asked = re.search(r"What does (\w+) keep", problem.question)[1]
        facts = re.findall(r"(\w+) keeps a ([a-z]+ [a-z]+)\.", problem.question)
        assert len(facts) == 6
        assert [kept for who, kept in facts if who == asked] == [problem.response]


def test_recall_keys_are_distinct_and_the_value_is_the_keys():
    for index in range(50):
        problem = TASKS["recall"].problem(index, context_tokens=512)
        listed = re.findall(r"([a-z ]+): (\d\d)", problem.question.removeprefix("Remember this"))
        pairs = {key.strip().removeprefix("list: "): value for key, value in listed}
        assert len(pairs) == len(listed)
        asked = re.search(r"number of the ([a-z ]+)\?", problem.question)[1]
        assert pairs[asked] == problem.answer


def test_recall_beyond_its_keys_is_refused():
    with pytest.raises(ValueError, match=r"context_tokens = 20, expected \d+ to \d+ for task rec"):
        TASKS["recall"].problem(0, context_tokens=20)


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"context_tokens leaves \d+ tokens for 6 facts of \d+"):
        TASKS["needle"].problem(0, difficulty=(1, 1), context_tokens=40)


@pytest.mark.parametrize("name", WITHOUT_CONTEXT)
def test_context_of_a_task_without_one_is_refused(name: str):
    with pytest.raises(ValueError, match=f"task {name} has no context; remove context_tokens"):
        TASKS[name].problem(0, context_tokens=256)


@pytest.mark.parametrize("level", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_difficulty_out_of_range_is_refused(level: tuple[float, float]):
    with pytest.raises(ValueError, match="expected 0 <= lowest <= highest <= 1"):
        TASKS["copy"].problem(0, difficulty=level)


def test_arithmetic_answer_follows_from_its_story():
    for index in range(300):
        problem = TASKS["arithmetic"].problem(index)
        total = 0
        for sentence in problem.question.split(".")[:-1]:
            number = int(re.search(r"\d+", sentence)[0])
            if "times as many" in sentence:
                total *= number
            elif "loses" in sentence:
                total -= number
            else:
                total += number
            assert total >= 0
        assert problem.answer == str(total)


def test_arithmetic_grows_in_digits_and_steps():
    easy, hard = (
        [TASKS["arithmetic"].problem(i, difficulty=(d, d)).question for i in range(50)]
        for d in (0.0, 1.0)
    )
    assert all(max(len(n) for n in re.findall(r"\d+", each)) == 1 for each in easy)
    assert all(max(len(n) for n in re.findall(r"\d+", each)) == 3 for each in hard)
    assert {each.count(".") for each in easy} == {2}
    assert {each.count(".") for each in hard} == {4}


def test_sequences_give_back_what_was_asked():
    for index in range(100):
        copied, turned, ordered = (
            TASKS[name].problem(index) for name in ("copy", "reverse", "sort")
        )
        assert copied.question.endswith(f": {copied.response}")
        assert turned.question.split(": ")[1].split() == turned.response.split()[::-1]
        numbers = [int(n) for n in ordered.response.split()]
        given_numbers = [int(n) for n in ordered.question.split(": ")[1].split()]
        assert sorted(given_numbers) == sorted(numbers)
        assert numbers == sorted(numbers, reverse="high to low" in ordered.question)


def test_constraints_ask_for_more_as_they_get_harder():
    def asked(level: float) -> set[int]:
        problems = [TASKS["constraints"].problem(i, difficulty=(level, level)) for i in range(100)]
        return {each.question.count(".") - 1 for each in problems}

    assert asked(0.0) == {1}
    assert asked(1.0) == {3}


def test_safety_refuses_the_harmful_and_helps_with_its_twin():
    kinds = Counter()
    for index in range(400):
        problem = TASKS["safety"].problem(index)
        is_refused = "unsafe" in problem.wrong
        assert is_refused != ("over_refusal" in problem.wrong)
        assert is_refused == problem.response.startswith("Sorry")
        kinds[is_refused] += 1
    assert 150 <= kinds[True] <= 250


@EVERY
def test_preferences_are_labelled_by_the_way_of_being_wrong(
    name: str, tokenizer: PreTrainedTokenizerFast
):
    for index in range(20):
        problem = TASKS[name].problem(index)
        for way in problem.wrong:
            row = problem.preference_row(way)
            assert row.signal == WAYS[way].signal
            assert row.difficulty == (problem.difficulty + WAYS[way].difficulty) / 2
            assert row.chosen != row.rejected
            assert render_preference(row, tokenizer).signal == row.signal


def test_a_way_that_a_problem_lacks_is_named():
    problem = TASKS["copy"].problem(0)
    with pytest.raises(ValueError, match=r"copy#0/0: no response is wrong by 'unsafe'; it has \['"):
        problem.preference_row("unsafe")


@EVERY
def test_rows_of_one_problem_agree(name: str):
    problem = TASKS[name].problem(3)
    prompt, chat, text = problem.prompt_row(), problem.chat_row(), problem.text_row()
    assert prompt.task == name
    assert prompt.difficulty == problem.difficulty
    assert chat.messages == (*prompt.prompt, {"role": "assistant", "content": problem.response})
    assert text.text == f"Question: {problem.question}\nAnswer: {problem.response}"
    assert {str(row.origin) for row in (prompt, chat, text)} == {f"{name}#0/3"}
    assert prompt.origin.licence == "Apache-2.0"


def test_splits_share_no_prompt_by_construction():
    sides: dict[str, set[str]] = {"train": set(), "dev": set()}
    for name, task in TASKS.items():
        for seed in (0, 1):
            for index in range(300):
                row = task.problem(index, seed=seed).prompt_row()
                sides[split_of(prompt_text(row))].add(prompt_text(row))
        assert sides["dev"], name
    assert not sides["train"] & sides["dev"]
    share = len(sides["dev"]) / (len(sides["dev"]) + len(sides["train"]))
    assert 0.08 < share < 0.12


def test_words_of_the_lexicon_are_one_token_each(tokenizer: PreTrainedTokenizerFast):
    words = (*NAMES, *COLOURS, *OBJECTS, *ANIMALS)
    single = [word for word in words if len(tokenizer.tokenize(f" {word}")) == 1]
    assert len(single) / len(words) > 0.9


def test_every_kind_of_row_trains_something(tokenizer: PreTrainedTokenizerFast):
    for task in TASKS.values():
        example = render_chat(task.problem(0).chat_row(), tokenizer)
        assert isinstance(example, Example)
        assert 2 <= example.num_trained < len(example.tokens)
