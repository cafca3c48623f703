"""The engine's laws: its numbers are the model's own, and nobody's neighbours change his tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from model import HybridForCausalLM, Packed
from rollout.native.engine import NativeEngine
from rollout.sync import checksums, weights
from rollout.types import Completion, Request, Sampling
from tests.helpers import assert_close
from tests.rollout.native.setting import VOCABULARY, make_model


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return make_model()


def make_requests(number: int, seed: int = 0, **sampling: object) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            f"r{i}",
            tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 7, 8, 9, 30, 70)))),
            replace(
                Sampling(
                    max_new_tokens=rng.choice((1, 2, 9, 20)),
                    temperature=rng.choice((0.0, 0.7, 1.0, 1.3)),
                    top_p=rng.choice((1.0, 0.9)),
                    top_k=rng.choice((0, 20)),
                    seed=i,
                    stop_token_ids=(3,),
                ),
                **sampling,
            ),
            num_samples=rng.choice((1, 2, 5)),
        )
        for i in range(number)
    ]


def make_engine(model: HybridForCausalLM, slots: int = 16, tokens: int = 4096) -> NativeEngine:
    return NativeEngine(model, max_slots=slots, max_cache_tokens=tokens, page_tokens=8)


def full_logits(model: HybridForCausalLM, done: Completion) -> torch.Tensor:
    """[response, V] by one forward over prompt and response, without a cache."""
    with torch.no_grad():
        hidden = model.model.run(Packed.from_sequences([done.prompt + done.tokens])).hidden
        return model.logits(hidden)[len(done.prompt) - 1 : -1]


def test_bf16_by_autocast_is_as_near_to_the_bf16_forward_as_bf16_itself(
    model: HybridForCausalLM,
):
    engine = NativeEngine(
        model, max_slots=8, max_cache_tokens=2048, page_tokens=8, autocast=torch.bfloat16
    )
    found, rounded, exact = [], [], []
    for done in engine.generate(make_requests(8, seed=6, temperature=1.0)):
        targets = torch.tensor(done.tokens)[:, None]
        found.append(torch.tensor(done.logprobs))
        exact.append(full_logits(model, done).log_softmax(-1).gather(-1, targets)[:, 0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = full_logits(model, done).float()
        rounded.append(logits.log_softmax(-1).gather(-1, targets)[:, 0])
    engine_gap, forward_gap, between = (
        (torch.cat(one) - torch.cat(other)).square().mean().sqrt()
        for one, other in ((found, exact), (rounded, exact), (found, rounded))
    )
    # two roundings of one number in bf16, each forward_gap from it: sqrt 2 apart if unrelated
    assert 0.5 * forward_gap < engine_gap < 2 * forward_gap
    assert between < 2 * forward_gap


def test_results_come_in_the_order_of_requests_and_samples(model: HybridForCausalLM):
    requests = make_requests(12)
    done = make_engine(model, slots=5).generate(requests)
    wanted = [(r.request_id, k, r.prompt) for r in requests for k in range(r.num_samples)]
    assert [(c.request_id, c.sample, c.prompt) for c in done] == wanted


def chosen(logits: torch.Tensor, done: Completion) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])[:, 0]


def test_logprobs_are_those_of_a_full_forward(model: HybridForCausalLM):
    every = make_engine(model, slots=7).generate(make_requests(12, seed=1))
    found = torch.cat([torch.tensor(done.logprobs) for done in every])
    exact = torch.cat([chosen(full_logits(model, done), done) for done in every])
    assert_close("logprobs", found, exact)


def test_filtered_logprobs_and_kept_mass_give_the_tempered_logprob(model: HybridForCausalLM):
    every = make_engine(model).generate(make_requests(8, seed=2, temperature=0.7))
    filtered, mass = (
        torch.cat([torch.tensor(numbers) for numbers in columns])
        for columns in zip(*((d.filtered_logprobs, d.kept_mass) for d in every), strict=True)
    )
    exact = torch.cat([chosen(full_logits(model, done) / 0.7, done) for done in every])
    assert_close("tempered logprobs", filtered + mass.log(), exact)


def test_tokens_depend_on_the_request_alone(model: HybridForCausalLM):
    requests = make_requests(9, seed=3)
    whole = make_engine(model).generate(requests)
    by_key = {(c.request_id, c.sample): c for c in whole}
    runs = [
        make_engine(model, slots=2).generate(requests),
        make_engine(model, slots=64).generate(requests[::-1]),
        make_engine(model, slots=16, tokens=200).generate(requests),
        [c for r in requests for c in make_engine(model).generate([r])],
        NativeEngine(
            model, max_slots=9, max_cache_tokens=4096, page_tokens=5, prefill_tokens=11
        ).generate(requests),
    ]
    for run in runs:
        assert len(run) == len(whole)
        others = [by_key[done.request_id, done.sample] for done in run]
        assert [done.tokens for done in run] == [other.tokens for other in others]
        assert [done.finish for done in run] == [other.finish for other in others]
        found, same = (
            torch.cat([torch.tensor(done.logprobs) for done in each]) for each in (run, others)
        )
        assert_close("logprobs", found, same)


def test_samples_of_a_group_and_seeds_differ(model: HybridForCausalLM):
    group = Request("a", (5, 6, 7), Sampling(max_new_tokens=12), num_samples=6)
    other = Request("b", (5, 6, 7), Sampling(max_new_tokens=12, seed=1), num_samples=6)
    done = make_engine(model).generate([group, other])
    assert len({c.tokens for c in done}) == 12


def test_greedy_is_the_argmax_of_full_forwards(model: HybridForCausalLM):
    requests = make_requests(6, seed=4, temperature=0.0, max_new_tokens=10, stop_token_ids=())
    for done in make_engine(model, slots=4).generate(requests):
        sequence = list(done.prompt)
        for _ in range(10):
            with torch.no_grad():
                hidden = model.model.run(Packed.from_sequences([sequence])).hidden
                sequence.append(int(model.logits(hidden[-1]).argmax()))
        assert done.tokens == tuple(sequence[len(done.prompt) :])


def test_a_response_ends_with_its_first_stop_token_or_at_its_limit(model: HybridForCausalLM):
    requests = make_requests(20, seed=5, max_new_tokens=20, stop_token_ids=(3, 9), temperature=1.3)
    done = make_engine(model).generate(requests)
    assert {c.finish for c in done} == {"stop", "length"}
    for completion in done:
        *before, last = completion.tokens
        assert not {3, 9} & set(before)
        assert (last in (3, 9)) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.tokens) == 20
        assert len(completion.logprobs) == len(completion.tokens)
        assert len(completion.filtered_logprobs) == len(completion.tokens)
        assert len(completion.kept_mass) == len(completion.tokens)


def test_modes_and_weights_of_the_model_are_left_alone():
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()], checksums(weights(model))
    make_engine(model).generate(make_requests(2))
    assert ([module.training for module in model.modules()], checksums(weights(model))) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_live_weights_are_sampled_from_and_versions_ride_on_completions():
    model, other = make_model(0), make_model(1)
    engine = make_engine(model)
    request = make_requests(1, temperature=1.0, max_new_tokens=20, stop_token_ids=())
    first = engine.generate(request)
    engine.update_weights(weights(other), version=7)
    second = engine.generate(request)
    assert (first[0].policy_version, second[0].policy_version) == (0, 7)
    assert second[0].tokens == make_engine(other).generate(request)[0].tokens
    assert second[0].tokens != first[0].tokens
    assert checksums(weights(model)) == checksums(weights(other))


def test_an_update_that_breaks_off_stops_the_engine_until_a_whole_one_came():
    model = make_model(0)
    engine = make_engine(model)
    stream = dict(weights(make_model(1)))
    partial = list(stream.items())[:-1]
    with pytest.raises(ValueError, match=r"1 of \d+ weights are missing from the stream, first"):
        engine.update_weights(partial, version=2)
    with pytest.raises(RuntimeError, match=r"update to version 2 broke off.*call update_weights"):
        engine.generate(make_requests(1))
    assert engine.policy_version == 0
    engine.update_weights(stream.items(), version=3)
    assert engine.generate(make_requests(1))[0].policy_version == 3


def test_nothing_to_do_gives_nothing(model: HybridForCausalLM):
    assert make_engine(model).generate([]) == []


def test_a_closed_engine_says_so(model: HybridForCausalLM):
    engine = make_engine(model)
    engine.close()
    with pytest.raises(RuntimeError, match="it is closed; make a new one"):
        engine.generate(make_requests(1))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((5, 64), "request 'p': token 64 is outside the model's vocabulary of 64"),
        ((-1,), "request 'p': token -1 is outside the model's vocabulary of 64"),
        ((1,) * 5000, "request 'p': a prompt of 5000 tokens and max_new_tokens = 256 need"),
    ],
)
def test_bad_prompts_are_refused(model: HybridForCausalLM, prompt: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        make_engine(model).generate([Request("p", prompt)])


@pytest.mark.parametrize("name", ["max_slots", "max_cache_tokens", "page_tokens", "prefill_tokens"])
def test_bad_limits_are_refused(model: HybridForCausalLM, name: str):
    limits = {"max_slots": 1, "max_cache_tokens": 1, name: 0}
    with pytest.raises(ValueError, match=rf"NativeEngine\.{name} = 0, expected >= 1"):
        NativeEngine(model, **limits)
