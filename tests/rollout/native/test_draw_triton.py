"""The draw's kernel against the sampler's torch form."""

from __future__ import annotations

import pytest
import torch

from rollout.native.sampler import Knobs, draw
from rollout.types import Sampling
from tests.helpers import assert_close
from tests.model.kernels import formula

TEMPERATURES = {"plain": (1.0,), "greedy": (1.0, 0.0), "tempered": (0.3, 1.0, 0.0, 2.5)}


@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize("words", [1, 70, 5000])
def test_kernel_draws_what_torch_draws(kind: str, words: int):
    launch = formula.launch("draw")
    rows = 24
    generator = torch.Generator().manual_seed(words)
    logits = 3 * torch.randn(rows, words + 3, generator=generator)[:, :words]
    # some can never be drawn; the greatest is left
    logits[:, 1::3] = float("-inf")
    temperatures = TEMPERATURES[kind]
    samplings = [
        Sampling(temperature=temperatures[i % len(temperatures)], seed=i * 2**40 - 3)
        for i in range(rows)
    ]
    knobs = Knobs.of([(s, i % 5) for i, s in enumerate(samplings)], device=formula.DEVICE)
    position = torch.arange(rows, device=formula.DEVICE) * 7
    tokens, logprobs, tempered = launch.draw_triton(
        logits.to(formula.DEVICE), knobs.temperature, knobs.seed, knobs.sample, position,
        is_tempered=knobs.tempered, has_greedy=knobs.greedy,
    )  # fmt: skip
    exact = draw(logits.to(formula.DEVICE), knobs, position, form="torch")
    assert torch.equal(tokens, exact.tokens)
    assert len(set(tokens.tolist())) > 5 or words < 70
    if words > 1:
        assert_close("logprobs", logprobs, exact.logprobs, 1e-6)
        assert_close("tempered", tempered, exact.filtered_logprobs, 1e-6)


def test_a_broken_row_gives_nan_and_leaves_the_others():
    launch = formula.launch("draw")
    logits = torch.zeros(4, 40, device=formula.DEVICE)
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    ones = torch.ones(4, dtype=torch.int64, device=formula.DEVICE)
    tokens, logprobs, _ = launch.draw_triton(
        logits, ones.float(), ones, ones, ones, is_tempered=False, has_greedy=False
    )
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert ((tokens >= 0) & (tokens < 40)).all()
    assert tokens[0] == tokens[3]
