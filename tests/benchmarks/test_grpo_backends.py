"""What benchmarks/grpo_backends.py takes for the same run, and what ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from align.data.batch import Batch, Example
from benchmarks.grpo_backends import BOUND, Trained, compare

LINE = {"loss": -0.2, "grad_norm": 1.5, "reward/mean": 0.4}


def example(place: str, tokens: tuple[int, ...] = (5, 6, 7), logprob: float = -1.0) -> Example:
    return Example(
        tokens, (0.0, 1.0, 1.0), place, behaviour_logprobs=(0.0, logprob, logprob),
        advantages=(0.0, 1.0, 1.0),
    )  # fmt: skip


def trained(*examples: Example, **changes: float) -> Trained:
    return Trained([LINE | changes], [(Batch.from_examples(examples),)], 1.0)


def test_the_largest_difference_of_each_number_is_told():
    one = trained(example("p:1#0"), example("p:1#1"))
    other = trained(example("p:1#0"), example("p:1#1", logprob=-1.00005), loss=-0.20002)
    worst = compare("vllm", one, other)
    assert worst["loss"] == pytest.approx(2e-5)
    assert worst["engine log-probabilities"] == pytest.approx(5e-5, rel=1e-2)
    assert worst["grad_norm"] == worst["reward/mean"] == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((example("p:1#0"),), "step 1 is made of other responses"),
        ((example("p:1#0"), example("p:1#0")), "step 1 is made of other responses"),
        ((example("p:1#1"), example("p:1#0")), "step 1 is made of other responses"),
        ((example("p:1#0"), example("p:1#1", (5, 6, 8))), "other tokens between p:1#0 and p:1#1"),
    ],
)
def test_what_is_lost_doubled_moved_or_another_token_ends_the_run(other: Any, message: str):
    with pytest.raises(SystemExit, match=f"killed: .*{message}"):
        compare("killed", trained(example("p:1#0"), example("p:1#1")), trained(*other))


@pytest.mark.parametrize("key", [*LINE])
@pytest.mark.parametrize("gap", [2 * BOUND, float("nan")])
def test_a_number_over_the_bound_ends_the_run(key: str, gap: float):
    one = trained(example("p:1#0"))
    other = replace(one, lines=[LINE | {key: LINE[key] + gap}])
    with pytest.raises(SystemExit, match=f"vllm: .'{key}'.*expected at most 0.0001"):
        compare("vllm", one, other)
