"""What fp32 buys between engine and trainer: the ledger with and without it, in head and states.

    python -m benchmarks.ledger [--tokens 256] [--responses 16] [--device cpu]

One policy of random weights in bf16, the tiny preset. The native engine samples, the trainer's
packed forward scores the same tokens, and the ledger of a grpo step says how far they are apart.
The head's matmul is in fp32 or in bf16 on both sides (`lm_head_fp32` of the model's config). The
engine's lightning states are fp32, as they always are, or rounded to bf16 after every turn, which
is what an engine that keeps them in bf16 holds. Samples differ between lines where numbers do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from align.ledger import entries, ledger_line
from align.losses.policy import PolicyLossConfig
from model import HybridForCausalLM, Packed, preset
from rollout.native.engine import NativeEngine
from rollout.types import Completion, Request, Sampling

PROMPT_TOKENS, VOCABULARY = 64, 1024
SHOWN = ("correlation", "gap_p50", "gap_p99", "gap_p999", "ratio", "ess_tokens", "ess_responses")


def sampled(
    model: HybridForCausalLM, *, responses: int, tokens: int, rounds_states: bool
) -> list[Completion]:
    """Responses to prompts of random tokens."""
    engine = NativeEngine(
        model, max_slots=responses, max_cache_tokens=responses * (PROMPT_TOKENS + tokens + 64)
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(responses):
        prompt = torch.randint(VOCABULARY, (PROMPT_TOKENS,), generator=generator).tolist()
        sampling = Sampling(max_new_tokens=tokens, seed=number)
        asked = Request(str(number), tuple(prompt), sampling, return_experts=True)
        engine.submit(asked)
    done = []
    while engine.num_in_flight:
        done += [t.completion for t in engine.step() if t.completion is not None]
        if rounds_states and engine._runner is not None:
            states = engine._runner.cache.states
            states.copy_(states.bfloat16())
    return done


@torch.no_grad()
def ledger(model: HybridForCausalLM, done: Sequence[Completion]) -> tuple[dict[str, float], float]:
    """The ledger's line of these responses, and the largest |log r|."""
    device = model.device
    rows = [one.prompt + one.tokens for one in done]
    targets = [t for row in rows for t in (*row[1:], 0)]
    there = [x for one in done for x in (*[0.0] * (len(one.prompt) - 1), *one.logprobs, 0.0)]
    trained = [
        x for one in done for x in (*[0.0] * (len(one.prompt) - 1), *[1.0] * len(one.tokens), 0.0)
    ]
    out = model(
        packed=Packed.from_sequences(rows, device=device),
        targets=torch.tensor(targets, device=device),
    )
    engine, weights = torch.tensor(there, device=device), torch.tensor(trained, device=device)
    found = entries(
        out.logprobs,
        engine,
        advantages=torch.ones_like(weights),
        weights=weights,
        lengths=[len(row) for row in rows],
        config=PolicyLossConfig(),
        experts=_experts(done).to(device),
        router_logits=out.router_logits,
    )
    return ledger_line(found.tolist()), float(((out.logprobs - engine) * weights).abs().max())


def _experts(done: Sequence[Completion]) -> Tensor:
    """[T, layers, K], -1 at the last token of each, which never entered the engine."""
    rows = []
    for one in done:
        assert one.experts is not None, "they were asked for"
        rows += [one.experts, torch.full_like(one.experts[:1], -1)]
    return torch.cat(rows)


def main() -> None:
    """Prints a line for each of the four."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    # wide enough that distributions are far from uniform
    config = preset("tiny", vocab_size=VOCABULARY, initializer_range=0.1)
    model = HybridForCausalLM(config).to(given.device, torch.bfloat16).eval()
    table = Table("head", "states", *SHOWN, "gap max", "router")
    for head in ("bf16", "fp32"):
        model.config.lm_head_fp32 = head == "fp32"
        for states in ("bf16", "fp32"):
            done = sampled(
                model,
                responses=given.responses,
                tokens=given.tokens,
                rounds_states=states == "bf16",
            )
            line, largest = ledger(model, done)
            shown = (f"{line[f'ledger/{name}']:.6g}" for name in SHOWN)
            table.add_row(head, states, *shown, f"{largest:.3g}", f"{line['ledger/router']:.5f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
