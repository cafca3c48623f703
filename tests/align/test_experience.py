"""From completions to examples: aligned, weighted, counted."""

from __future__ import annotations

import math

import pytest

from align.advantage import advantages
from align.data.batch import Batch
from align.data.rows import Origin, PromptRow
from align.experience import Group, describe, examples_of, response_text, to_example
from reward.types import Score, Verdict
from rollout.types import Completion


def completion(sample: int, tokens: tuple[int, ...], finish: str = "stop", **changes) -> Completion:
    size = len(tokens)
    return Completion(
        **{
            "request_id": "0",
            "sample": sample,
            "prompt": (1, 2),
            "tokens": tokens,
            "logprobs": (-3.0,) * size,
            "filtered_logprobs": tuple(-0.5 - i for i in range(size)),
            "kept_mass": (0.8,) * size,
            "finish": finish,
            "policy_version": 4,
            **changes,
        }
    )


def row(task: str, verifier: str = "math") -> PromptRow:
    message = {"role": "user", "content": "?"}
    return PromptRow((message,), Origin("p.jsonl:3"), answer="1", verifier=verifier, task=task)


def score(value: float, verdict: float | None = None, valid: bool = True) -> Score:
    signals = {} if verdict is None else {"rule:math": Verdict(verdict)}
    return Score(value, signals=signals, valid=valid)


def test_every_number_lands_on_the_token_it_belongs_to():
    example = to_example(completion(0, (7, 8, 9)), 2.0, "p:1")
    batch = Batch.from_examples([example])
    assert batch.targets.tolist() == [2, 7, 8, 9, 0]
    assert batch.weights.tolist() == [0, 1, 1, 1, 0]
    assert batch.advantages.tolist() == [0, 2, 2, 2, 0]
    expected = [-0.5 + math.log(0.8), -1.5 + math.log(0.8), -2.5 + math.log(0.8)]
    assert batch.behaviour_logprobs.tolist() == pytest.approx([0, *expected, 0])


def test_responses_without_a_valid_score_are_left_out_and_named_by_place():
    group = Group(
        row("sums"),
        tuple(completion(i, (5 + i,)) for i in range(3)),
        (score(1.0), score(0.0, valid=False), score(0.0)),
    )
    found = advantages([group.scores], "none")
    examples = examples_of([group], found.values)
    assert [e.place for e in examples] == ["p.jsonl:3#0", "p.jsonl:3#2"]
    assert [e.advantages[-1] for e in examples] == [0.5, -0.5]


def test_a_rollout_is_described_by_what_is_known():
    groups = [
        Group(
            row("sums"),
            (completion(0, (5,)), completion(1, (5, 6, 7), "length")),
            (score(1.0, 1.0), score(0.0, 0.0)),
        ),
        Group(
            row("sort"),
            (completion(0, (5, 6)), completion(1, (5, 6))),
            (score(0.5, 0.5), score(7.0, valid=False)),
        ),
    ]
    numbers = describe(groups, advantages([g.scores for g in groups]))
    assert numbers == {
        "rollout/responses": 4,
        "rollout/invalid": 1,
        "rollout/flat_groups": 0.5,
        "rollout/unfinished": 0.25,
        "rollout/response_tokens": 2,
        "rollout/response_tokens_max": 3,
        "rollout/nll": 3,
        "rollout/kept_mass": pytest.approx(0.8),
        "rollout/kept_mass_min": 0.8,
        "reward/mean": 0.5,
        "reward/std": pytest.approx(math.sqrt(1 / 6)),
        "accuracy/all": 0.5,
        "accuracy/sums": 0.5,
        "accuracy/sort": 0.5,
    }


def test_nothing_judged_gives_no_mean():
    group = Group(row("x", ""), (completion(0, (5,)),), (score(0.0, valid=False),))
    numbers = describe([group], advantages([group.scores]))
    assert not {"reward/mean", "reward/std", "accuracy/all"} & numbers.keys()


class Letters:
    def decode(self, tokens) -> str:
        return "".join(chr(97 + token) for token in tokens)


def test_the_text_of_a_response_ends_before_its_stop_token():
    assert response_text(completion(0, (0, 1, 2)), Letters()) == "ab"
    assert response_text(completion(0, (0, 1, 2), "length"), Letters()) == "abc"
