"""The sampler's laws: exact distribution, exact bookkeeping, and tokens that ignore neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from model.kernels.draw.splitmix import uniform
from rollout.native.sampler import Drawn, Knobs, draw, kept, refuse_broken
from rollout.types import Sampling

NUM_DRAWS = 20_000


def logits_of(rows: int, vocabulary: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def draw_many(logits: Tensor, sampling: Sampling, number: int = NUM_DRAWS) -> Drawn:
    knobs = Knobs.of([(sampling, sample) for sample in range(number)])
    return draw(logits.expand(number, -1), knobs, torch.zeros(number, dtype=torch.int64))


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over its degrees of freedom: about 1 for a right sampler."""
    expected = probabilities * tokens.numel()
    seen = torch.bincount(tokens, minlength=probabilities.numel()).double()
    cells = expected > 0
    assert not seen[~cells].any(), "a token of probability zero was drawn"
    statistic = ((seen - expected)[cells].square() / expected[cells]).sum()
    return float(statistic / max(1, int(cells.sum()) - 1))


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution as transformers' own filters make it."""
    scores = logits / sampling.temperature
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores.double().softmax(-1)


FILTERS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(top_k=3),
    Sampling(top_p=0.7),
    Sampling(min_p=0.2),
    Sampling(temperature=1.5, top_k=9, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("sampling", FILTERS)
def test_tokens_follow_the_distribution_transformers_would_sample_from(sampling: Sampling):
    logits = logits_of(1)
    exact = warped(logits, sampling)[0]
    drawn = draw_many(logits, sampling)
    # 15 degrees of freedom: the statistic over them exceeds 2.6 once in a thousand right samplers
    assert chi_square(drawn.tokens, exact) < 2.6


@pytest.mark.parametrize("sampling", FILTERS)
def test_filtered_logprobs_and_kept_mass_are_those_of_the_filtered_distribution(
    sampling: Sampling,
):
    logits = logits_of(1, seed=3)
    drawn = draw_many(logits, sampling, 500)
    exact = warped(logits, sampling)[0]
    tempered = (logits / sampling.temperature).double().softmax(-1)[0]
    mass = tempered[exact > 0].sum()
    torch.testing.assert_close(
        drawn.filtered_logprobs.double(), exact[drawn.tokens].log(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(drawn.kept_mass.double(), mass.expand(500), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        drawn.logprobs.double(),
        logits.double().log_softmax(-1)[0, drawn.tokens],
        rtol=1e-5,
        atol=1e-6,
    )


def test_rows_of_different_settings_do_not_touch_each_other():
    logits = logits_of(len(FILTERS) + 1, vocabulary=50)
    rows = [(sampling, 3 + i) for i, sampling in enumerate((*FILTERS, Sampling(temperature=0.0)))]
    positions = torch.arange(len(rows))
    together = draw(logits, Knobs.of(rows), positions)
    for order in (list(range(len(rows))), [7, 2, 0, 5, 1, 6, 4, 3]):
        for i in order:
            alone = draw(logits[i : i + 1], Knobs.of([rows[i]]), positions[i : i + 1])
            assert alone.tokens[0] == together.tokens[i]
            assert alone.logprobs[0] == together.logprobs[i]
            torch.testing.assert_close(alone.kept_mass[0], together.kept_mass[i])
            torch.testing.assert_close(alone.filtered_logprobs[0], together.filtered_logprobs[i])


def test_greedy_takes_the_most_likely_token_with_certainty():
    logits = logits_of(5)
    drawn = draw(logits, Knobs.of([(Sampling(temperature=0.0), 0)] * 5), torch.arange(5))
    assert drawn.tokens.tolist() == logits.argmax(-1).tolist()
    assert drawn.filtered_logprobs.tolist() == [0.0] * 5
    assert drawn.kept_mass.tolist() == [1.0] * 5
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1).amax(-1))


def test_top_k_keeps_exactly_k_of_equal_tokens_by_lowest_id():
    keep = kept(torch.full((1, 6), 1 / 6), Knobs.of([(Sampling(top_k=2), 0)]))
    assert keep.tolist() == [[True, True, False, False, False, False]]


def test_filters_never_empty_a_row():
    harsh = Sampling(top_k=1, top_p=1e-6, min_p=1.0)
    keep = kept(logits_of(4).softmax(-1), Knobs.of([(harsh, 0)] * 4))
    assert keep.sum(-1).tolist() == [1, 1, 1, 1]


def test_random_numbers_are_uniform_and_unrelated_between_counters():
    number = 200_000
    counter = torch.arange(number)
    zero = torch.zeros_like(counter)
    streams = (
        uniform(counter, zero, zero),
        uniform(zero, counter, zero),
        uniform(zero, zero, counter),
    )
    for stream in streams:
        assert stream.min() >= 0
        assert stream.max() < 1
        counts = torch.histc(stream, bins=256, min=0, max=1).double()
        # 255 degrees of freedom: standard deviation of the ratio is 0.089
        assert ((counts - number / 256).square() / (number / 256)).sum() / 255 < 1.4
        neighbours = torch.corrcoef(torch.stack([stream[1:], stream[:-1]]))[0, 1]
        assert abs(neighbours) < 5 / number**0.5
    for first, second in ((0, 1), (0, 2), (1, 2)):
        related = torch.corrcoef(torch.stack([streams[first], streams[second]]))[0, 1]
        assert abs(related) < 5 / number**0.5
    together = torch.cat([stream[1:] for stream in streams])
    assert together.unique().numel() == together.numel()


def test_random_numbers_never_change():
    numbers = uniform(torch.tensor([0, 1, 2**62]), torch.tensor([0, 5, 7]), torch.tensor([0, 9, 3]))
    reference = [reference_uniform(*counters) for counters in ((0, 0, 0), (1, 5, 9), (2**62, 7, 3))]
    assert numbers.tolist() == reference


def reference_uniform(*counters: int) -> float:
    """SplitMix64 in Python's unbounded integers."""
    word = (1 << 64) - 1
    state = 0
    for counter in counters:
        state = ((state ^ counter) + 0x9E3779B97F4A7C15) & word
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_broken_row_is_named(bad: float):
    logits = logits_of(3)
    logits[1] = bad
    with pytest.raises(RuntimeError, match=r"row 1 of the logits has no finite distribution"):
        refuse_broken(
            draw(logits, Knobs.of([(Sampling(), 0)] * 3), torch.arange(3)).logprobs.tolist()
        )


def test_a_forbidden_token_is_never_drawn():
    logits = torch.zeros(1, 8)
    logits[0, 5] = float("-inf")
    drawn = draw_many(logits, Sampling(), 5000)
    assert 5 not in drawn.tokens.tolist()
    assert chi_square(drawn.tokens, logits.double().softmax(-1)[0]) < 3.5
