"""Prompts read, answered and judged: what both sampling stages stand on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from align.data.rows import Origin, PromptRow
from align.data.sources import DataConfig
from align.prompts import (
    answer,
    end_of_turn,
    judge,
    judged,
    malformed,
    open_engine,
    read_prompts,
    seed_of,
)
from reward.scorer import InProcessScorer
from reward.types import Item, Score
from rollout.types import Sampling
from tests.align import small


class LengthScorer:
    """Scores a response by its length and remembers what it was asked."""

    version = "length@1"

    def __init__(self) -> None:
        self.asked: list[Item] = []

    def score(self, items: Sequence[Item]) -> list[Score]:
        self.asked += items
        return [Score(float(len(item.response)), version=self.version) for item in items]


def row(question: str, answer: str = "mat", verifier: str = "exact") -> PromptRow:
    return PromptRow(
        ({"role": "user", "content": question},),
        Origin("p.jsonl:1"),
        answer=answer,
        verifier=verifier,
    )


def write(path: Path, records: Sequence[dict]) -> DataConfig:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(path=path.name, split="all")


def record(question: str, **more: object) -> dict:
    message = {"role": "user", "content": question}
    return {"prompt": [message], "answer": "mat", "verifier": "exact", "arguments": {}, **more}


def test_prompts_of_all_sources_come_in_order_with_their_tokens_and_counts(tmp_path: Path):
    first = write(tmp_path / "a.jsonl", [record("the cat"), record("the hat")])
    second = write(tmp_path / "b.jsonl", [record("the mat")])
    prompts = read_prompts(
        [first, second.model_copy(update={"weight": 2.0})],
        job=small.job(tmp_path),
        tokenizer=small.tokenizer(),
        max_tokens=100,
    )
    said = [prompt.row.prompt[0]["content"] for prompt in prompts.items]
    assert said == ["the cat", "the hat", "the mat", "the mat"]
    assert [entry["taken"] for entry in prompts.data] == [2, 2]
    assert prompts.data[0]["tokens"] == sum(len(p.tokens) for p in prompts.items[:2])
    assert prompts.max_tokens == max(len(p.tokens) for p in prompts.items)


def test_long_prompts_are_an_error_or_counted(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", [record("cat"), record("the cat and the hat " * 9)])
    given = {"job": small.job(tmp_path), "tokenizer": small.tokenizer(), "max_tokens": 20}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the prompt has \d+ tokens, expected"):
        read_prompts([source], **given)
    skipping = source.model_copy(update={"too_long": "skip"})
    prompts = read_prompts([skipping], **given)
    assert (len(prompts.items), prompts.data[0]["too_long"]) == (1, 1)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*\(0 of 2 prompts of a\.jsonl fit\)"):
        read_prompts([skipping], **given | {"max_tokens": 1})


def test_prompts_that_cannot_be_rendered_are_an_error_or_counted(tmp_path: Path):
    tokenizer = small.tokenizer()
    bad = record(f"the {tokenizer.eos_token} cat")
    source = write(tmp_path / "a.jsonl", [record("cat"), bad])
    given = {"job": small.job(tmp_path), "tokenizer": tokenizer, "max_tokens": 99}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*special token.*on_bad_row: skip"):
        read_prompts([source], **given)
    skipping = source.model_copy(update={"on_bad_row": "skip"})
    (entry,) = read_prompts([skipping], **given).data
    assert (entry["rows"], entry["skipped"]) == (1, 1)
    assert entry["reasons"][0].startswith("a.jsonl:2: ")
    only = write(tmp_path / "b.jsonl", [bad]).model_copy(update={"on_bad_row": "skip"})
    with pytest.raises(ValueError, match=r"b\.jsonl: no prompt is left of 1, first b\.jsonl:1: "):
        read_prompts([only], **given)


def test_a_prompt_that_nobody_can_judge_is_refused(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", [record("the cat", verifier="", answer="")])
    given = {"tokenizer": small.tokenizer(), "max_tokens": 99}
    with pytest.raises(ValueError, match=r"a\.jsonl:1: names no verifier .* add `reward:`"):
        read_prompts([source], job=small.job(tmp_path), **given)
    judged = small.job(tmp_path, inputs={"reward": tmp_path})
    assert len(read_prompts([source], job=judged, **given).items) == 1


def test_a_row_of_another_kind_is_refused(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", [{"text": "the cat sat"}])
    texts = source.model_copy(update={"as_": "text"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a TextRow, expected a prompt; set `as: p"):
        read_prompts([texts], job=small.job(tmp_path), tokenizer=small.tokenizer(), max_tokens=99)


def test_malformed_responses_score_zero_and_no_judge_sees_them():
    tokenizer, scorer = small.tokenizer(), LengthScorer()
    special = tokenizer.eos_token
    texts = ["the mat", " \n", "", f"the {special} mat", "cat"]
    scores = judge([row("?")] * 5, texts, tokenizer=tokenizer, scorer=scorer)
    assert [item.response for item in scorer.asked] == ["the mat", "cat"]
    assert [score.value for score in scores] == [7, 0, 0, 0, 3]
    assert [score.reason for score in scores] == [
        "",
        "malformed: empty",
        "malformed: empty",
        f"malformed: special token {special}",
        "",
    ]
    assert all(score.valid and score.version == "length@1" for score in scores)
    assert malformed("the mat", tokenizer) == ""


def test_nothing_to_judge_asks_nobody():
    scorer = LengthScorer()
    assert judge([row("?")], [""], tokenizer=small.tokenizer(), scorer=scorer)[0].value == 0
    assert scorer.asked == []


def test_groups_hold_the_completions_and_scores_of_their_own_prompt(tmp_path: Path):
    tokenizer = small.tokenizer()
    source = write(tmp_path / "a.jsonl", [record("cat"), record("the hat"), record("mat")])
    prompts = read_prompts(
        [source], job=small.job(tmp_path), tokenizer=tokenizer, max_tokens=100
    ).items
    engine = open_engine(small.model(), max_concurrent=3, max_tokens=40)
    sampling = Sampling(max_new_tokens=6, stop_token_ids=(end_of_turn(tokenizer),))
    given = {
        "sampling": sampling,
        "num_samples": 2,
        "tokenizer": tokenizer,
        "scorer": InProcessScorer(),
    }
    seeded = [(prompt, seed_of(0, i)) for i, prompt in enumerate(prompts)]
    groups = answer(engine, seeded, **given)
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.row is prompt.row
        assert [c.sample for c in group.completions] == [0, 1]
        assert {c.prompt for c in group.completions} == {prompt.tokens}
        assert len(group.scores) == 2
    # a prompt's samples depend on its own seed alone
    alone = answer(engine, seeded[2:], **given)[0]
    assert [c.tokens for c in alone.completions] == [c.tokens for c in groups[2].completions]
    assert len({c.tokens for g in groups for c in g.completions}) > 3


def test_a_process_without_prompts_has_no_groups():
    class Nobody:
        def score(self, items):
            raise AssertionError("nothing is there to be judged")

    assert judged([], [], tokenizer=small.tokenizer(), scorer=Nobody()) == []
