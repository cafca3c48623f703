"""vLLM with the plugin: tokens and log-probabilities are the native engine's, after a push too.

Needs vLLM, so it runs in an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from model import HybridForCausalLM, preset
from rollout.native.engine import NativeEngine
from rollout.sync import checksums, weights
from rollout.types import Completion, Request, Sampling

pytest.importorskip("vllm", reason="vllm is not installed here; run make test-vllm")
pytestmark = pytest.mark.vllm

if TYPE_CHECKING:
    from rollout.vllm_backend import VllmEngine

VOCABULARY = 200
LENGTHS = (1, 5, 17, 64, 65, 150, 300, 1000)
BOUND = 1e-5


def make_model(seed: int) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = preset(
        "tiny",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        rms_norm_eps=1e-5,
        lightning_norm_eps=3e-5,
        # the distributions are far from uniform, and fp32 still carries 1e-5
        initializer_range=0.1,
    )
    return HybridForCausalLM(config).eval()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(f"{seed}/{length}")
    return tuple(rng.randrange(VOCABULARY) for _ in range(length))


def greedy(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Request]:
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    return [Request(f"{seed}/{n}", prompt(n, seed), sampling) for n in lengths]


def native(model: HybridForCausalLM, requests: list[Request]) -> list[Completion]:
    return NativeEngine(model, max_slots=32, max_cache_tokens=16384).generate(requests)


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert other.tokens == one.tokens, f"prompt of {len(one.prompt)}"
        for column in ("logprobs", "filtered_logprobs", "kept_mass"):
            pairs = zip(getattr(one, column), getattr(other, column), strict=True)
            assert max(abs(a - b) for a, b in pairs) <= BOUND, (column, len(one.prompt))
        assert (other.request_id, other.sample) == (one.request_id, one.sample)
        assert other.finish == one.finish


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return make_model(0)


@pytest.fixture(scope="module")
def engine(model: HybridForCausalLM) -> Iterator[VllmEngine]:
    from rollout.vllm_backend import VllmEngine

    made = VllmEngine(
        model.config, max_slots=32, max_tokens=1280, cache_bytes=2**28, prefill_tokens=320
    )
    with pytest.raises(RuntimeError, match="holds no weights yet"):
        made.generate(greedy((5,)))
    made.update_weights(weights(model), 0)
    yield made
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.generate(greedy((5,)))


def test_greedy_tokens_of_all_lengths_in_one_batch_are_the_native_engines(model, engine):
    # 320 tokens a forward: prompts of 1,000 go in pieces, beside decodes of shorter ones
    requests = greedy()
    assert_same(native(model, requests), engine.generate(requests))


def test_cached_prefix_changes_nothing(model, engine):
    requests = greedy(seed=1)
    first, again = engine.generate(requests), engine.generate(requests)
    assert_same(native(model, requests), first)
    assert_same(first, again)


def test_samples_under_a_seed_are_the_native_engines(model, engine):
    base = Sampling(max_new_tokens=12, temperature=0.8, seed=5, stop_token_ids=(3, 9))
    requests = [
        Request("plain", prompt(30), replace(base, temperature=1.0), num_samples=4),
        Request("top-p", prompt(7), replace(base, top_p=0.8), num_samples=3),
        Request("top-k", prompt(1), replace(base, top_k=5, min_p=0.1), num_samples=2),
        Request("greedy", prompt(70), replace(base, temperature=0.0)),
    ]
    assert_same(native(model, requests), engine.generate(requests))


def test_pushed_weights_are_held_bit_for_bit_and_sampled_from(model, engine):
    other = make_model(1)
    requests = greedy(seed=2)
    before = engine.generate(requests)
    engine.update_weights(weights(other), 7)
    assert checksums(engine.weights()) == checksums(weights(other))
    after = engine.generate(requests)
    assert {done.policy_version for done in after} == {7}
    assert [done.tokens for done in after] != [done.tokens for done in before]
    assert_same(native(other, requests), after)
    engine.update_weights(weights(model), 8)
    assert_same(before, engine.generate(requests))


def test_push_that_is_not_whole_stops_the_engine(model, engine):
    stream = list(weights(model))
    for broken, message in (
        (stream[1:], r"1 weights are missing from the stream, first"),
        ([("model.visual", torch.ones(1)), *stream], r"tensor model\.visual is not part of"),
        ([(stream[0][0], stream[0][1][1:]), *stream[1:]], r"has shape \(199, 64\), expected"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.update_weights(broken, 3)
        with pytest.raises(RuntimeError, match="the update to version 3 broke off"):
            engine.generate(greedy((5,)))
    engine.update_weights(stream, 8)
    assert_same(native(model, greedy((5,))), engine.generate(greedy((5,))))


def test_requests_that_can_never_run_are_refused(engine):
    with pytest.raises(ValueError, match="request 'a': 1270 \\+ 24 tokens, expected"):
        engine.generate([Request("a", prompt(1270), Sampling(max_new_tokens=24))])
    with pytest.raises(ValueError, match="request 'b': token 200 is outside"):
        engine.generate([Request("b", (1, 200))])

    @dataclass(frozen=True)
    class Wider(Request):
        with_more: bool = False

    engine.generate([Wider("c", (1, 2), Sampling(max_new_tokens=1))])
    with pytest.raises(ValueError, match="request 'c': with_more = True, expected False: vLLM"):
        engine.generate([Wider("c", (1, 2), with_more=True)])


def test_running_engine_takes_the_names_on_disk_too(model, engine, tmp_path: Path):
    from model.checkpoints import stream_folder

    other = make_model(4)
    other.save_pretrained(tmp_path)
    engine._llm.apply_model(lambda network: network.load_weights(stream_folder(tmp_path)))
    assert checksums(engine.weights()) == checksums(weights(other))
    engine.update_weights(weights(model), 8)
