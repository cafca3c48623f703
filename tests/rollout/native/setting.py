"""The model, the requests and the loop that the engine's tests share."""

from __future__ import annotations

import random

import torch

from model import HybridForCausalLM, preset
from rollout.native.engine import NativeEngine
from rollout.types import Completion, Request, Sampling

VOCABULARY = 64


def make_model(seed: int = 0, layers: int = 3, spread: float = 0.3) -> HybridForCausalLM:
    torch.manual_seed(seed)
    config = preset(
        "tiny",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        head_dim=16,
        rotary_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"][:layers],
        # larger than the usual 0.02, so that the distributions are far from uniform
        initializer_range=spread,
    )
    return HybridForCausalLM(config)


def requests_of(chance: random.Random, number: int) -> list[Request]:
    """Prompts of many lengths, of which several begin alike."""
    stem = tuple(chance.randrange(VOCABULARY) for _ in range(60))
    found = []
    for i in range(number):
        tail = tuple(chance.randrange(VOCABULARY) for _ in range(chance.choice((1, 3, 8, 20, 50))))
        sampling = Sampling(
            max_new_tokens=chance.choice((1, 2, 9, 30)),
            temperature=chance.choice((0.0, 0.7, 1.0, 1.3)),
            top_p=chance.choice((1.0, 0.9)),
            top_k=chance.choice((0, 20)),
            seed=i,
            stop_token_ids=(3,),
        )
        prompt = stem[: chance.choice((0, 0, 16, 37, 60))] + tail
        found.append(Request(f"r{i}", prompt, sampling, chance.choice((1, 2, 4))))
    return found


def run(engine: NativeEngine, requests: list[Request], chance: random.Random) -> list[Completion]:
    """Submits at random turns, in random order."""
    waiting = list(requests)
    chance.shuffle(waiting)
    done: list[Completion] = []
    while waiting or engine.num_in_flight:
        for _ in range(chance.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop())
        done += [token.completion for token in engine.step() if token.completion is not None]
    order = {request.request_id: i for i, request in enumerate(requests)}
    return sorted(done, key=lambda one: (order[one.request_id], one.sample))
