"""What a service drives: requests that come and go while others run."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from align.lora import LoraConfig, apply_lora
from model import HybridForCausalLM, Packed
from rollout.native.engine import NativeEngine
from rollout.sync import copy_weights
from rollout.types import Completion, Request, Sampling, Token
from tests.rollout.native.setting import make_model, requests_of, run


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return make_model()


def engine_of(model: HybridForCausalLM, **options: object) -> NativeEngine:
    return NativeEngine(model, **{"max_slots": 6, "max_cache_tokens": 400, "page_tokens": 8,
                                  "decode": as_text, **options})  # fmt: skip


def as_text(tokens: list[int]) -> str:
    """Two letters a token."""
    return "".join(f"{chr(97 + token // 8)}{chr(97 + token % 8)}" for token in tokens)


def until_done(engine: NativeEngine) -> list[Token]:
    told = []
    while engine.num_in_flight:
        told += engine.step()
    return told


def test_tokens_come_one_by_one_and_the_last_carries_the_completion(model: HybridForCausalLM):
    engine = engine_of(model)
    requests = requests_of(random.Random(3), 5)
    for request in requests:
        engine.submit(request)
    told = until_done(engine)
    done = {(t.request_id, t.sample): t.completion for t in told if t.completion is not None}
    assert set(done) == {(r.request_id, k) for r in requests for k in range(r.num_samples)}
    for key, completion in done.items():
        own = [t for t in told if (t.request_id, t.sample) == key]
        assert tuple(t.token for t in own) == completion.tokens
        assert tuple(t.logprob for t in own) == completion.logprobs
        assert [t.completion is not None for t in own] == [False] * (len(own) - 1) + [True]
    assert engine.step() == []


def test_timings_add_up(model: HybridForCausalLM):
    engine = engine_of(model, max_slots=2)
    for name in "ab":
        engine.submit(Request(name, (5, 6, 7), Sampling(max_new_tokens=9), num_samples=2))
    first, second = (
        t.completion.timings
        for t in until_done(engine)
        if t.completion is not None and t.sample == 0
    )
    assert first is not None
    assert second is not None
    # b waited for a to end
    assert second.queued_s > first.queued_s + first.prefill_s + first.decode_s - 1e-3
    assert min(first.prefill_s, first.decode_s, second.prefill_s, second.decode_s) > 0


def test_a_stop_string_ends_with_the_token_that_completes_it(model: HybridForCausalLM):
    sampling = Sampling(max_new_tokens=40, seed=7)
    (free,) = engine_of(model).generate([Request("a", (5, 6, 7), sampling)])
    text = as_text(list(free.tokens))
    # from the middle of one token to the middle of the next
    string = text[11:14]
    end = text.index(string) + len(string)
    stopping = Sampling(max_new_tokens=40, seed=7, stop_strings=("zzz", string))
    (done,) = engine_of(model).generate([Request("a", (5, 6, 7), stopping)])
    assert done.finish == "stop"
    assert done.tokens == free.tokens[: -(-end // 2)]
    assert done.logprobs == free.logprobs[: len(done.tokens)]


def test_certain_tokens_in_a_row_end_a_response():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[9] = 0
        model.config.lm_head_fp32 = False
    # every token equally likely: 1 / 64 each
    for probability, wanted in ((1 / 65, ("repetition", 5)), (1 / 63, ("length", 20))):
        sampling = Sampling(
            max_new_tokens=20, repetition_tokens=5, repetition_probability=probability
        )
        (done,) = engine_of(model).generate([Request("a", (5, 6, 7), sampling)])
        assert (done.finish, len(done.tokens)) == wanted


def test_cancelled_requests_tell_what_they_had_and_free_everything(model: HybridForCausalLM):
    engine = engine_of(model)
    sampling = Sampling(max_new_tokens=50)
    engine.submit(Request("live", (5, 6, 7), sampling, num_samples=3))
    engine.submit(Request("other", (5, 6, 7), sampling))
    had = engine.step() + engine.step()
    engine.submit(Request("queued", (1, 2), sampling))
    for name in ("live", "queued"):
        engine.cancel(name)
    assert engine.num_in_flight == 1
    assert engine.stats.num_free_slots == 5
    told = [t for t in engine.step() if t.request_id != "other"]
    assert [(t.request_id, t.sample, t.token) for t in told] == [
        ("live", 0, -1), ("live", 1, -1), ("live", 2, -1), ("queued", 0, -1)
    ]  # fmt: skip
    for t in told:
        assert t.completion is not None
        assert t.completion.finish == "cancelled"
        own = [h.token for h in had if (h.request_id, h.sample) == (t.request_id, t.sample)]
        assert t.completion.tokens == tuple(own)
    with pytest.raises(ValueError, match="request 'live' is not in flight"):
        engine.cancel("live")


def test_an_id_in_flight_is_refused_and_free_again_afterwards(model: HybridForCausalLM):
    engine = engine_of(model)
    request = Request("a", (5, 6, 7), Sampling(max_new_tokens=3))
    engine.submit(request)
    with pytest.raises(ValueError, match=r"request 'a' is in flight; wait for its end"):
        engine.submit(request)
    with pytest.raises(RuntimeError, match=r"1 submitted samples are in flight; call step"):
        engine.generate([request])
    with pytest.raises(RuntimeError, match=r"1 samples are in flight; cancel them"):
        engine.release()
    until_done(engine)
    engine.submit(request)
    assert len(until_done(engine)) == 3


def test_stop_strings_without_text_are_refused(model: HybridForCausalLM):
    request = Request("a", (5,), Sampling(stop_strings=("x",)))
    with pytest.raises(ValueError, match=r"stop_strings = \('x',\) need text; give the engine"):
        engine_of(model, decode=None).submit(request)


def test_prefix_borders_that_no_page_ends_at_are_refused(model: HybridForCausalLM):
    with pytest.raises(ValueError, match=r"prefix_tokens = 12, expected a multiple of page_tokens"):
        engine_of(model, max_prefixes=1, prefix_tokens=12)


def test_a_turn_that_breaks_leaves_an_engine_that_works(model: HybridForCausalLM):
    broken = make_model()
    engine = engine_of(broken)
    request = Request("a", (5, 6, 7), Sampling(max_new_tokens=9))
    (first,) = engine.generate([request])
    kept = broken.lm_head.weight.detach().clone()
    engine.submit(request)
    engine.step()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="row 0 of the logits has no finite distribution"):
        until_done(engine)
    assert engine.num_in_flight == 0
    with torch.no_grad():
        broken.lm_head.weight.copy_(kept)
    assert engine.generate([request])[0].logprobs == first.logprobs


def test_completions_carry_the_version_that_began_them():
    engine = engine_of(make_model())
    engine.submit(Request("old", (5, 6, 7), Sampling(max_new_tokens=9)))
    engine.step()
    engine.update_weights(make_model(1).state_dict().items(), version=4)
    engine.submit(Request("new", (5, 6, 7), Sampling(max_new_tokens=9)))
    done = [t.completion for t in until_done(engine) if t.completion is not None]
    assert {one.request_id: one.policy_version for one in done} == {"old": 0, "new": 4}


def test_adapters_are_sampled_from_without_merging():
    adapted = apply_lora(make_model(), LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.03)
    request = Request("a", (5, 6, 7), Sampling(max_new_tokens=12), num_samples=3)
    base = engine_of(make_model()).generate([request])
    found = engine_of(adapted).generate([request])
    plain = adapted.get_base_model()
    for one in found:
        packed = Packed.from_sequences([one.prompt + one.tokens])
        with torch.no_grad():
            logits = plain.logits(plain.model.run(packed).hidden)[len(one.prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert one.logprobs == pytest.approx(exact.tolist(), abs=1e-5)
    assert [one.logprobs for one in found] != [one.logprobs for one in base]


def churn(model: HybridForCausalLM, number: int) -> None:
    """Requests that end, stop, pause and are cancelled; nothing of them is left."""
    chance = random.Random(0)
    engine = engine_of(model, max_slots=24, max_cache_tokens=320, max_prefixes=2,
                       prefix_tokens=16, prefill_tokens=32)  # fmt: skip
    done: list[Completion] = []
    names = iter(range(number))
    told: list[Token] = []
    while engine.num_in_flight or told or not done:
        for i in itertools.islice(names, 4):
            prompt = tuple(chance.randrange(64) for _ in range(chance.choice((1, 5, 20, 40))))
            sampling = Sampling(max_new_tokens=chance.randint(1, 12), stop_token_ids=(3,), seed=i)
            engine.submit(Request(f"r{i}", prompt, sampling, num_samples=chance.randint(1, 3)))
        groups = list(engine._plan.groups.values())
        if groups and chance.random() < 0.3:
            engine.cancel(chance.choice(groups).request.request_id)
        told = engine.step()
        done += [t.completion for t in told if t.completion is not None]
    assert {one.request_id for one in done} == {f"r{i}" for i in range(number)}
    assert len({(one.request_id, one.sample) for one in done}) == len(done)
    assert {one.finish for one in done} == {"stop", "length", "cancelled"}
    assert engine.stats.num_pauses > 0
    engine.policy_version = 1
    assert engine.stats.num_free_slots == 24
    assert engine.stats.num_free_pages == 40


def test_nothing_is_left_of_many_requests(model: HybridForCausalLM):
    churn(model, 60)


@pytest.mark.slow
def test_nothing_is_left_of_ten_thousand_requests():
    churn(make_model(layers=2), 10_000)


def test_weights_that_change_on_the_way_are_used_from_the_next_turn_on(model: HybridForCausalLM):
    live = make_model()
    engine = engine_of(live)
    engine.submit(Request("a", (5, 6, 7), Sampling(max_new_tokens=1)))
    (first,) = engine.step()
    copy_weights(live, make_model(1).state_dict().items())
    engine.policy_version = 1
    found = run(engine, [Request("b", (5, 6, 7), Sampling(max_new_tokens=1))], random.Random(0))
    packed = Packed.from_sequences([[5, 6, 7]])
    with torch.no_grad():
        logits = live.logits(live.model.run(packed).hidden)[-1].log_softmax(-1)
    assert found[0].logprobs[0] == pytest.approx(float(logits[found[0].tokens[0]]), abs=1e-5)
    assert found[0].logprobs[0] != first.logprob
