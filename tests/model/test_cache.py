"""Cached, chunked, forked: what a cache continues is what the whole sequence would give."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import DecodeCache, HybridForCausalLM, Packed
from tests.helpers import assert_close, slow
from tests.model.setting import (
    exact,
    random_sequences,
    separate_logits,
    shared_model,
)


def cache_for(model: HybridForCausalLM, slots: int = 6, pages: int = 64) -> DecodeCache:
    return DecodeCache(
        model.config, num_slots=slots, num_pages=pages, page_tokens=16, dtype=model.dtype
    )


def continue_cache(
    model: HybridForCausalLM, cache: DecodeCache, pieces: dict[int, Sequence[int]]
) -> dict[int, Tensor]:
    """Feeds each slot its next tokens in one packed call; the logits of each slot's tokens."""
    slots = tuple(pieces)
    flat = [token for slot in slots for token in pieces[slot]]
    positions = [int(cache.lengths[slot]) + i for slot in slots for i in range(len(pieces[slot]))]
    lengths = tuple(len(pieces[slot]) for slot in slots)
    packed = Packed(torch.tensor(flat), torch.tensor(positions), lengths)
    with torch.no_grad():
        out = model.logits(model.model.run(packed, cache=cache, slots=slots).hidden)
    return dict(zip(slots, out.split(lengths), strict=True))


def test_cached_decode_equals_full_forward(model: HybridForCausalLM):
    (sequence,) = random_sequences([75])
    cache = cache_for(model)
    slot = cache.allocate()
    rows = [continue_cache(model, cache, {slot: sequence[:30]})[slot]]
    rows += [continue_cache(model, cache, {slot: [token]})[slot] for token in sequence[30:]]
    assert int(cache.lengths[slot]) == 75
    assert_close("logits", torch.cat(rows), separate_logits(model, [sequence])[0], exact(model))


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_chunked_prefill_of_several_slots_equals_whole_prefill(lengths: list[int], seed: int):
    model, chance = shared_model(torch.float32), random.Random(seed)
    sequences = random_sequences(lengths)
    cache = cache_for(model)
    left = {cache.allocate(): list(sequence) for sequence in sequences}
    rows: dict[int, list[Tensor]] = {slot: [] for slot in left}
    while any(left.values()):
        cuts = {slot: chance.randint(0, len(tokens)) for slot, tokens in left.items()}
        pieces = {slot: left[slot][:cut] for slot, cut in cuts.items() if cut}
        left = {slot: tokens[cuts[slot] :] for slot, tokens in left.items()}
        if pieces:
            for slot, out in continue_cache(model, cache, pieces).items():
                rows[slot].append(out)
    with torch.no_grad():
        for slot, alone in zip(rows, separate_logits(model, sequences), strict=True):
            assert_close("logits", torch.cat(rows[slot]), alone, exact(model))


@pytest.mark.parametrize("at", [15, 16, 17, *slow(1, 40)])
def test_forked_slots_go_their_own_ways(model: HybridForCausalLM, at: int):
    prompt, first, second, third = random_sequences([at, 20, 25, 3])
    cache = cache_for(model)
    parent = cache.allocate()
    continue_cache(model, cache, {parent: prompt})
    child, other = cache.fork(parent), cache.fork(parent)
    assert int(cache.lengths[child]) == at
    rows: dict[int, list[Tensor]] = {parent: [], child: [], other: []}
    tails = {parent: first, child: second, other: third}
    for step in range(25):
        pieces = {slot: tail[step : step + 1] for slot, tail in tails.items() if step < len(tail)}
        for slot, out in continue_cache(model, cache, pieces).items():
            rows[slot].append(out)
    for slot, tail in tails.items():
        alone = separate_logits(model, [prompt + tail])[0][at:]
        assert_close("logits", torch.cat(rows[slot]), alone, exact(model))


def test_freed_slot_starts_clean_and_leaves_the_others(model: HybridForCausalLM):
    prompt, tail, fresh = random_sequences([20, 20, 30])
    cache = cache_for(model, slots=2)
    parent = cache.allocate()
    continue_cache(model, cache, {parent: prompt})
    child = cache.fork(parent)
    cache.free(parent)
    again = cache.allocate()
    assert int(cache.lengths[again]) == 0
    out = continue_cache(model, cache, {again: fresh, child: tail})
    assert_close("fresh", out[again], separate_logits(model, [fresh])[0], exact(model))
    assert_close("kept", out[child], separate_logits(model, [prompt + tail])[0][20:], exact(model))


def test_pages_come_back_when_slots_are_freed(model: HybridForCausalLM):
    cache = cache_for(model, slots=3, pages=5)
    for _ in range(4):
        slot = cache.allocate()
        continue_cache(model, cache, {slot: random_sequences([60])[0]})
        fork = cache.fork(slot)
        continue_cache(model, cache, {fork: [5]})
        cache.free(slot)
        cache.free(fork)
        assert cache.num_free_pages == 5


def test_cache_says_when_it_is_full(model: HybridForCausalLM):
    cache = cache_for(model, slots=1, pages=2)
    slot = cache.allocate()
    with pytest.raises((RuntimeError, ValueError), match="num_slots"):
        cache.allocate()
    with pytest.raises((RuntimeError, ValueError), match="num_pages"):
        continue_cache(model, cache, {slot: random_sequences([33])[0]})
