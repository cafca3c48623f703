"""Nothing that an engine does with a request changes it: not a bit of it on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Packed
from rollout.native.engine import NativeEngine
from rollout.types import Completion, Request, Sampling
from tests.helpers import assert_close
from tests.rollout.native.setting import make_model, requests_of, run

MODEL = make_model()
# the full forward of MODEL rounds by up to 1e-5 itself, of this one by half of it
MILDER = make_model(spread=0.25)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(done: list[Completion]) -> list[tuple[object, ...]]:
    """All but times, versions and lists of experts."""
    return [dataclasses.astuple(dataclasses.replace(c, timings=None, experts=None)) for c in done]


def test_pausing_happens_and_prefixes_are_hit_in_the_engines_below():
    chance = random.Random(0)
    requests = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_new_tokens=30))
        for r in requests_of(chance, 16)
    ]
    engine = NativeEngine(
        MODEL, max_slots=12, max_cache_tokens=160, page_tokens=8, prefill_tokens=16,
        max_prefixes=3, prefix_tokens=16,
    )  # fmt: skip
    found = run(engine, requests, chance)
    assert engine.stats.num_pauses > 3
    assert engine.stats.num_prefix_tokens >= 16
    assert engine.stats.num_free_slots == 12
    roomy = NativeEngine(
        MODEL, max_slots=99, max_cache_tokens=9999, page_tokens=8, prefill_tokens=16
    )
    assert bits(found) == bits(roomy.generate(requests))
    assert roomy.stats.num_pauses == 0


@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 999),
    slots=st.integers(2, 20),
    tokens=st.integers(160, 600),
    max_prefixes=st.sampled_from((0, 0, 1, 4)),
    ahead=st.sampled_from(("never", "always")),
)
def test_every_bit_is_that_of_the_request_alone(
    seed: int, slots: int, tokens: int, max_prefixes: int, ahead: str
):
    check_bits(seed, slots=slots, tokens=tokens, max_prefixes=max_prefixes, number=5, ahead=ahead)


@pytest.mark.slow
def test_every_bit_is_that_of_the_request_alone_on_two_threads():
    with threads(2):
        check_bits(1, slots=20, tokens=600, max_prefixes=2, number=4)


def check_bits(
    seed: int, *, slots: int, tokens: int, max_prefixes: int, number: int, ahead: str = "never"
) -> None:
    chance = random.Random(seed)
    requests = requests_of(chance, number)
    engine = NativeEngine(
        MODEL, max_slots=slots, max_cache_tokens=tokens, page_tokens=8, prefill_tokens=16,
        max_prefixes=max_prefixes, prefix_tokens=16, ahead=ahead,
    )  # fmt: skip
    found = run(engine, requests, chance)
    alone = [
        done
        for request in requests
        for done in NativeEngine(
            MODEL, max_slots=9, max_cache_tokens=999, page_tokens=8, prefill_tokens=16
        ).generate([request])
    ]
    assert bits(found) == bits(alone)


@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 999),
    slots=st.integers(2, 20),
    tokens=st.integers(160, 600),
    page_tokens=st.sampled_from((4, 10, 20)),
    prefill_tokens=st.sampled_from((20, 60, 999)),
)
def test_logprobs_are_those_of_the_full_packed_forward(
    seed: int, slots: int, tokens: int, page_tokens: int, prefill_tokens: int
):
    chance = random.Random(seed)
    engine = NativeEngine(
        MILDER, max_slots=slots, max_cache_tokens=tokens, page_tokens=page_tokens,
        prefill_tokens=prefill_tokens, max_prefixes=2, prefix_tokens=20,
    )  # fmt: skip
    done = run(engine, requests_of(chance, 7), chance)
    packed = Packed.from_sequences([one.prompt + one.tokens for one in done])
    # in fp64: the forward's own rounding in fp32 is as large as the engine's
    wide = copy.deepcopy(MILDER).double()
    with torch.no_grad():
        logprobs = wide.logits(wide.model.run(packed).hidden).log_softmax(-1)
    rows = logprobs.split(packed.lengths)
    for one, row in zip(done, rows, strict=True):
        targets = torch.tensor(one.tokens)[:, None]
        exact = row[len(one.prompt) - 1 : -1].gather(-1, targets)[:, 0]
        torch.testing.assert_close(
            torch.tensor(one.logprobs).double(), exact.double(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("ahead", ["never", "always"])
def test_recorded_experts_are_those_of_the_full_forward(ahead: str):
    chance = random.Random(5)
    requests = [dataclasses.replace(r, return_experts=i % 2 == 0)
                for i, r in enumerate(requests_of(chance, 8))]  # fmt: skip
    engine = NativeEngine(
        MODEL, max_slots=6, max_cache_tokens=400, page_tokens=8, prefill_tokens=24,
        max_prefixes=4, prefix_tokens=24, ahead=ahead,
    )  # fmt: skip
    for request in requests:
        for one in engine.generate([request]):
            if not request.return_experts:
                assert one.experts is None
                continue
            with torch.no_grad():
                packed = Packed.from_sequences([one.prompt + one.tokens[:-1]])
                out = MODEL.model.run(packed)
            exact = torch.stack([layer.topk(2, dim=-1).indices for layer in out.router_logits], 1)
            assert one.experts is not None
            assert one.experts.dtype == torch.int16
            assert torch.equal(one.experts.long(), exact)


def test_a_change_of_weights_forgets_what_was_known_of_prompts():
    model = make_model()
    engine = NativeEngine(
        model, max_slots=2, max_cache_tokens=400, page_tokens=8, prefill_tokens=16,
        max_prefixes=4, prefix_tokens=16,
    )  # fmt: skip
    request = Request("a", tuple(range(40)), Sampling(max_new_tokens=8, temperature=0.0))
    engine.generate([request])
    engine.generate([request])
    assert engine.stats.num_prefix_tokens == 32
    engine.update_weights(make_model(1).state_dict().items(), version=1)
    found = engine.generate([request])[0]
    assert engine.stats.num_prefix_tokens == 32
    fresh = NativeEngine(
        make_model(1), max_slots=2, max_cache_tokens=400, page_tokens=8, prefill_tokens=16
    )
    assert found.logprobs == fresh.generate([request])[0].logprobs


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_memory_is_kept_or_given_back(keeps_cache: bool):
    engine = NativeEngine(MODEL, max_slots=2, max_cache_tokens=400, keeps_cache=keeps_cache)
    request = Request("a", (5, 6, 7), Sampling(max_new_tokens=8, seed=3))
    first = engine.generate([request])
    assert (engine._runner is not None) == keeps_cache
    assert bits(engine.generate([request])) == bits(first)


def test_bf16_weights_stay_within_their_rounding_of_the_full_forward():
    model = make_model().bfloat16()
    engine = NativeEngine(model, max_slots=6, max_cache_tokens=400, page_tokens=8)
    done = engine.generate(requests_of(random.Random(2), 6))
    found = torch.tensor([x for one in done for x in one.logprobs])
    exact = []
    with torch.no_grad():
        for one in done:
            out = model.model.run(Packed.from_sequences([one.prompt + one.tokens]))
            row = model.logits(out.hidden)[len(one.prompt) - 1 : -1].log_softmax(-1)
            exact.append(row.gather(-1, torch.tensor(one.tokens)[:, None])[:, 0])
    assert_close("logprobs", found, torch.cat(exact), 5e-2)
