"""On a GPU: graphs, packed prefill and own kernels give the model's own numbers."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from model import HybridForCausalLM, Packed, preset
from rollout.native.engine import NativeEngine
from rollout.native.padded import BUCKETS
from rollout.types import Completion, Request, Sampling
from tests.rollout.native.setting import VOCABULARY, make_model, requests_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def engine_of(model: HybridForCausalLM, **options: object) -> NativeEngine:
    values = {"max_slots": 12, "max_cache_tokens": 500, "page_tokens": 16, "prefill_tokens": 64}
    return NativeEngine(model, **{**values, **options})


def exact_logprobs(model: HybridForCausalLM, done: list[Completion]) -> Tensor:
    """Of all tokens drawn, in order, by the full packed forward."""
    packed = Packed.from_sequences([one.prompt + one.tokens for one in done], device="cuda")
    with torch.no_grad():
        logprobs = model.logits(model.model.run(packed).hidden).float().log_softmax(-1)
    found = []
    for one, row in zip(done, logprobs.split(packed.lengths), strict=True):
        targets = torch.tensor(one.tokens, device="cuda")[:, None]
        found.append(row[len(one.prompt) - 1 : -1].gather(-1, targets)[:, 0])
    return torch.cat(found).cpu()


def gap(model: HybridForCausalLM, done: list[Completion]) -> float:
    """Largest difference to the full packed forward, in nats."""
    found = torch.tensor([x for one in done for x in one.logprobs])
    return float((found - exact_logprobs(model, done)).abs().max())


@pytest.mark.parametrize(
    ("graphs", "buckets"), [(False, "never"), (False, "always"), (True, "never"), (True, "cuda")]
)
def test_fp32_is_the_full_forward(graphs: bool, buckets: str):
    model = make_model().cuda()
    chance = random.Random(0)
    engine = engine_of(
        model, graphs=graphs, buckets=buckets, max_cache_tokens=176, max_prefixes=2,
        prefix_tokens=32,
    )  # fmt: skip
    done = run(engine, requests_of(chance, 16), chance)
    assert gap(model, done) < 1e-4
    assert engine.stats.num_pauses > 0
    assert engine.stats.num_free_slots == 12


@pytest.mark.parametrize("buckets", ["never", "always"])
def test_graphs_and_eager_steps_draw_the_same_tokens(buckets: str):
    model = make_model().cuda().bfloat16()
    requests = requests_of(random.Random(1), 12)
    found = [
        engine_of(model, graphs=graphs, buckets=buckets).generate(requests)
        for graphs in (False, True)
    ]
    assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]


def padded_requests(*, samples: int, new: int) -> list[Request]:
    """In turn around the borders of the buckets, so that each graph meets rows of longer pieces."""
    chance = random.Random(7)
    lengths = [1, 2, *(size + more for size in BUCKETS for more in (1, 0, -1))]
    return [
        Request(
            f"r{length}",
            tuple(chance.randrange(VOCABULARY) for _ in range(length)),
            Sampling(max_new_tokens=new, seed=length),
            samples,
        )
        for length in lengths
    ]


def one_by_one(engine: NativeEngine, requests: list[Request]) -> list[Completion]:
    return [one for request in requests for one in engine.generate([request])]


def test_a_captured_bucket_is_plain_prefill():
    model = make_model().cuda()
    requests = padded_requests(samples=2, new=4)
    found = {}
    for name, options in {
        "captured": {"buckets": "cuda"},
        "padded": {"buckets": "always", "graphs": False},
        "plain": {"buckets": "never"},
    }.items():
        engine = engine_of(model, max_cache_tokens=2000, prefill_tokens=999, **options)
        done = one_by_one(engine, requests)
        assert gap(model, done) < 1e-4
        found[name] = [one.tokens for one in done]
        assert engine._runner is not None
        graphs = [rows for rows in BUCKETS if (rows, False) in engine._runner._piece_graphs]
        assert graphs == (list(BUCKETS) if name == "captured" else [])
        assert list(engine._runner._padded) == ([] if name == "plain" else list(BUCKETS))
    assert found["captured"] == found["padded"] == found["plain"]


@pytest.mark.parametrize(
    "options", [{}, {"prefill_tokens": 32, "max_prefixes": 4, "prefix_tokens": 32}]
)
def test_a_captured_bucket_in_bf16_is_as_far_from_fp32_as_the_full_forward(options: dict[str, int]):
    torch.manual_seed(0)
    # every token goes to both experts: a choice that rounding flips would drown what is measured
    config = preset(
        "tiny", vocab_size=VOCABULARY, num_hidden_layers=3, head_dim=128, initializer_range=0.1,
        num_local_experts=2, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = HybridForCausalLM(config).cuda().bfloat16()
    engine = engine_of(model, **{"max_cache_tokens": 2000, "prefill_tokens": 999, **options})
    done = one_by_one(engine, padded_requests(samples=1, new=16))
    found = torch.tensor([x for one in done for x in one.logprobs])
    forward = exact_logprobs(model, done)
    wide = exact_logprobs(model.float(), done)
    own, others = ((x - wide).square().mean().sqrt() for x in (found, forward))
    assert 0 < own < 1.25 * others


def test_new_weights_and_moved_weights_are_seen_by_graphs():
    model = make_model().cuda()
    engine = engine_of(model)
    requests = [
        Request("a", (5, 6, 7), Sampling(max_new_tokens=20, temperature=0.0), num_samples=2)
    ]
    engine.generate(requests)
    engine.update_weights(make_model(1).state_dict().items(), version=1)
    assert gap(model, engine.generate(requests)) < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
    assert gap(model, engine.generate(requests)) < 1e-4


def test_recorded_experts_come_from_graphs_too():
    model = make_model().cuda()
    request = dataclasses.replace(requests_of(random.Random(2), 1)[0], return_experts=True)
    for one in engine_of(model).generate([request]):
        packed = Packed.from_sequences([one.prompt + one.tokens[:-1]], device="cuda")
        with torch.no_grad():
            logits = model.model.run(packed).router_logits
        exact = torch.stack([layer.topk(2, dim=-1).indices for layer in logits], 1).cpu()
        assert one.experts is not None
        assert torch.equal(one.experts.long(), exact)
