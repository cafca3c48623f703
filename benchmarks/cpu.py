"""CPU training step of a 4M-parameter model: ours against transformers' `minimax`.

    python -m benchmarks.cpu [--steps 7] [--threads 2] [--keep-memory] [--profile]

Both models hold the same weights and train on the same 16 documents of 512 tokens in fp32 with
the same AdamW, forward + backward + step, router balance loss included. The two take turns in one
process, so that whatever else the machine does hits both alike; reported are medians. With
--keep-memory both run as the command `align` runs on a CPU, freed memory kept in the process;
without it, as the C library comes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from model import HybridConfig, HybridForCausalLM, Packed
from model.config import count_parameters
from stages.heap import keep_freed_memory

SEQUENCES, TOKENS = 16, 512
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 288,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["linear_attention"] * 7 + ["full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
GOAL = 3.0
Step = Callable[[], float]


def pair() -> tuple[HybridForCausalLM, MiniMaxForCausalLM]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    ours = HybridForCausalLM(HybridConfig(**SHAPE))
    theirs = MiniMaxForCausalLM(MiniMaxConfig(**SHAPE))
    left = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not left.unexpected_keys
    return ours.train(), theirs.train()


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def our_step(model: HybridForCausalLM, tokens: Tensor) -> Step:
    packed = Packed.from_sequences(tokens.tolist())
    targets = tokens.roll(-1, dims=1).flatten()
    weights = torch.ones(tokens.shape)
    weights[:, -1] = 0.0
    weights = weights.flatten() / weights.sum()
    optim = optimizer(model)

    def step() -> float:
        out = model(packed=packed, targets=targets)
        loss = -(out.logprobs * weights).sum() + out.aux_loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


def their_step(model: MiniMaxForCausalLM, tokens: Tensor) -> Step:
    optim = optimizer(model)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


def timed(step: Step) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds of all threads, loss."""
    start, worked = time.perf_counter(), time.process_time()
    loss = step()
    return time.perf_counter() - start, time.process_time() - worked, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--keep-memory", action="store_true", help="as `align` on a CPU; for both")
    parser.add_argument("--profile", action="store_true", help="print where our step spends time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this C library has no mallopt; leave it out")
    console = Console(width=120)
    ours, theirs = pair()
    tokens = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, TOKENS))
    steps = {"ours": our_step(ours, tokens), "transformers": their_step(theirs, tokens)}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    worked: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        losses = {}
        for name, step in steps.items():
            spent, work, losses[name] = timed(step)
            seconds[name].append(spent)
            worked[name].append(work)
        gap = abs(losses["ours"] - losses["transformers"])
        if gap > 1e-3 * losses["transformers"]:
            raise RuntimeError(f"losses {losses} differ: the two do not train the same model")
    total = count_parameters(ours.config).total
    console.print(
        f"{total / 1e6:.2f}M parameters, {SEQUENCES} x {TOKENS} tokens, fp32, "
        f"{options.threads} threads, freed memory {'kept' if options.keep_memory else 'returned'}, "
        f"torch {torch.__version__}, medians of {options.steps} steps"
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]) * 1e3:.0f}-{max(seconds[name]) * 1e3:.0f}"
        rate = SEQUENCES * TOKENS / median
        console.print(
            f"{name:>13}: {median * 1e3:7.0f} ms a step ({spread}), {rate:8.0f} tokens/s, "
            f"{statistics.median(worked[name]):.2f} CPU seconds"
        )
    ratio = medians["transformers"] / medians["ours"]
    console.print(f"{'ratio':>13}: {ratio:.2f} (goal >= {GOAL:.0f})")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            steps["ours"]()
        console.print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
