"""On a GPU: graphs, packed prefill and own kernels give the model's own numbers."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from model import HybridForCausalLM, Packed
from rollout.native.engine import NativeEngine
from rollout.types import Completion, Request, Sampling
from tests.rollout.native.setting import make_model, requests_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def engine_of(model: HybridForCausalLM, **options: object) -> NativeEngine:
    values = {"max_slots": 12, "max_cache_tokens": 500, "page_tokens": 16, "prefill_tokens": 64}
    return NativeEngine(model, **{**values, **options})


def gap(model: HybridForCausalLM, done: list[Completion]) -> float:
    """Largest difference to the full packed forward, in nats."""
    packed = Packed.from_sequences([one.prompt + one.tokens for one in done], device="cuda")
    with torch.no_grad():
        logprobs = model.logits(model.model.run(packed).hidden).float().log_softmax(-1)
    worst = 0.0
    for one, row in zip(done, logprobs.split(packed.lengths), strict=True):
        targets = torch.tensor(one.tokens, device="cuda")[:, None]
        exact = row[len(one.prompt) - 1 : -1].gather(-1, targets)[:, 0].cpu()
        worst = max(worst, float((torch.tensor(one.logprobs) - exact).abs().max()))
    return worst


@pytest.mark.parametrize("graphs", [False, True])
def test_fp32_is_the_full_forward(graphs: bool):
    model = make_model().cuda()
    chance = random.Random(0)
    engine = engine_of(model, graphs=graphs, max_cache_tokens=176, max_prefixes=2, prefix_tokens=32)
    done = run(engine, requests_of(chance, 16), chance)
    assert gap(model, done) < 1e-4
    assert engine.stats.num_pauses > 0
    assert engine.stats.num_free_slots == 12


def test_graphs_and_eager_steps_draw_the_same_tokens():
    model = make_model().cuda().bfloat16()
    requests = requests_of(random.Random(1), 12)
    found = [engine_of(model, graphs=graphs).generate(requests) for graphs in (False, True)]
    assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]


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
