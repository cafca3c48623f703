"""Pieces of prompts padded to a bucket give the numbers of the full packed forward."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch

from model import Packed
from rollout.native.engine import NativeEngine
from rollout.native.padded import BUCKETS, MAX_PAIRS, bucket_of
from rollout.types import Completion, Request, Sampling
from tests.helpers import slow
from tests.rollout.native.setting import VOCABULARY, make_model, requests_of, run

MODEL = make_model(spread=0.25)
WIDE = copy.deepcopy(MODEL).double()
# around the border of every bucket, and beyond the last
LENGTHS = (1, 2, *(size + more for size in BUCKETS for more in (-1, 0, 1)))


def engine_of(**options: object) -> NativeEngine:
    values = {"max_slots": 12, "max_cache_tokens": 999, "page_tokens": 8, "buckets": "always"}
    return NativeEngine(MODEL, **{**values, **options})


def check(done: list[Completion]) -> None:
    """Log-probabilities against the packed forward in fp64, which rounds nothing itself."""
    packed = Packed.from_sequences([one.prompt + one.tokens for one in done])
    with torch.no_grad():
        logprobs = WIDE.logits(WIDE.model.run(packed).hidden).log_softmax(-1)
    for one, row in zip(done, logprobs.split(packed.lengths), strict=True):
        targets = torch.tensor(one.tokens)[:, None]
        exact = row[len(one.prompt) - 1 : -1].gather(-1, targets)[:, 0]
        found = torch.tensor(one.logprobs).double()
        torch.testing.assert_close(found, exact.double(), rtol=0, atol=1e-5)


def prompt_of(chance: random.Random, length: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCABULARY) for _ in range(length))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_of_any_length_and_its_forks_are_exact(length: int):
    prompt = prompt_of(random.Random(length), length)
    engine = engine_of()
    done = engine.generate([Request("a", prompt, Sampling(max_new_tokens=5), num_samples=3)])
    check(done)
    assert engine._runner is not None
    used = tuple(engine._runner._padded)
    assert used == tuple(size for size in BUCKETS if length <= size)[:1]


@pytest.mark.parametrize("length", [33, 64, 65, 95, 129])
@pytest.mark.parametrize("chunk", [32, 40, 64])
def test_a_piece_goes_on_from_what_its_slot_holds(length: int, chunk: int):
    prompt = prompt_of(random.Random(length), length)
    request = Request("a", prompt, Sampling(max_new_tokens=5), num_samples=2)
    engine = engine_of(prefill_tokens=chunk)
    check(engine.generate([request]))
    prefixed = engine_of(prefill_tokens=chunk, max_prefixes=4, prefix_tokens=chunk)
    for _ in range(2):
        check(prefixed.generate([request]))
    assert prefixed.stats.num_prefix_tokens == (length - 1) // chunk * chunk


@pytest.mark.parametrize("seed", [0, *slow(1, 3)])
@pytest.mark.parametrize("own_bits", [True, False])
def test_mixed_with_decode_pauses_and_prefixes(seed: int, own_bits: bool):
    chance = random.Random(seed)
    requests = requests_of(chance, 14)
    engine = engine_of(
        max_cache_tokens=176, prefill_tokens=48, max_prefixes=3, prefix_tokens=16, own_bits=own_bits
    )
    check(run(engine, requests, chance))
    assert engine.stats.num_pauses > 0
    assert engine.stats.num_prefix_tokens > 0
    assert engine.stats.num_free_slots == 12


@pytest.mark.parametrize("ahead", ["never", "always"])
def test_every_bit_is_that_of_the_request_alone(ahead: str):
    chance = random.Random(3)
    requests = requests_of(chance, 6)
    options = {"prefill_tokens": 16, "max_prefixes": 2, "prefix_tokens": 16, "ahead": ahead}
    found = run(engine_of(max_cache_tokens=200, **options), requests, chance)
    alone = [one for r in requests for one in engine_of(prefill_tokens=16).generate([r])]
    bits = [
        [dataclasses.astuple(dataclasses.replace(one, timings=None)) for one in done]
        for done in (found, alone)
    ]
    assert bits[0] == bits[1]


def test_the_same_tokens_are_drawn_as_without():
    requests = requests_of(random.Random(4), 8)
    found = [engine_of(buckets=choice).generate(requests) for choice in ("always", "never")]
    assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]


def test_a_cpu_pads_only_when_told_to():
    engine = engine_of(buckets="cuda")
    engine.generate([Request("a", (5, 6, 7), Sampling(max_new_tokens=2))])
    assert engine._runner is not None
    assert not engine._runner._padded


def test_padding_has_no_experts():
    request = dataclasses.replace(requests_of(random.Random(5), 1)[0], return_experts=True)
    for one in engine_of(prefill_tokens=40).generate([request]):
        with torch.no_grad():
            out = MODEL.model.run(Packed.from_sequences([one.prompt + one.tokens[:-1]]))
        exact = torch.stack([layer.topk(2, dim=-1).indices for layer in out.router_logits], 1)
        assert one.experts is not None
        assert torch.equal(one.experts.long(), exact)


def test_what_others_hold_is_not_touched():
    engine = engine_of(max_cache_tokens=400)
    first, second = (
        Request("a", prompt_of(random.Random(seed), 20), Sampling(max_new_tokens=1))
        for seed in (0, 1)
    )
    engine.generate([first])
    assert engine._runner is not None
    cache, filler = engine._runner.cache, engine._runner.filler
    cache.states.normal_()
    cache.pages.normal_()
    states, pages = cache.states.clone(), cache.pages.clone()
    check(engine.generate([second]))
    slots = (states != cache.states).flatten(2).any(2).any(0)
    assert int(slots.sum()) == 1
    assert not slots[filler]
    # [L', 2, N, Z, G, D] -> [N, Z]
    rows = (pages != cache.pages).flatten(4).any(4).any(1).any(0)
    assert int(rows.sum()) == 20 + 1
    assert rows[cache.tables[filler][0]].tolist() == [True] + 7 * [False]


def test_the_bucket_is_the_smallest_that_holds_the_piece():
    assert [bucket_of(0, n) for n in (1, 32, 33, 256, 257)] == [32, 32, 64, 256, 512]
    assert bucket_of(0, 513) is None
    # keys before the piece are read anew for each of its rows
    far = MAX_PAIRS // 32
    assert bucket_of(far - 32, far) == 32
    assert bucket_of(far - 31, far + 1) is None
