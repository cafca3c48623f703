"""CPU training step of a 4M-parameter model: ours against transformers' `minimax`.

    python -m benchmarks.cpu [--steps 7] [--threads 2] [--profile bf16]

Both models hold the same weights and train on the same 16 documents of 512 tokens with the same
AdamW on fp32 weights, forward + backward + step, router balance loss included: each in fp32, and in
bf16 by autocast, as `precision: bf16` of a stage does. All take turns in one process, so that
whatever else the machine does hits all alike; reported are medians. The ratio for a precision of
ours is to the faster of both precisions of transformers.
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
# how far the losses of the two may lie apart, relative
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-3}
Name = tuple[str, str]
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


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def our_step(model: HybridForCausalLM, tokens: Tensor, precision: str) -> Step:
    packed = Packed.from_sequences(tokens.tolist())
    targets = tokens.roll(-1, dims=1).flatten()
    weights = torch.ones(tokens.shape)
    weights[:, -1] = 0.0
    weights = weights.flatten() / weights.sum()
    optim = optimizer(model)

    def step() -> float:
        with autocast(precision):
            out = model(packed=packed, targets=targets)
            loss = -(out.logprobs * weights).sum() + out.aux_loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


def their_step(model: MiniMaxForCausalLM, tokens: Tensor, precision: str) -> Step:
    optim = optimizer(model)

    def step() -> float:
        with autocast(precision):
            loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


def make_steps(tokens: Tensor) -> tuple[dict[Name, Step], int]:
    """A step of each model in each precision, on weights of its own, and the parameters of one."""
    steps: dict[Name, Step] = {}
    parameters = 0
    for precision in TOLERANCE:
        ours, theirs = pair()
        steps["ours", precision] = our_step(ours, tokens, precision)
        steps["transformers", precision] = their_step(theirs, tokens, precision)
        parameters = count_parameters(ours.config).total
    return steps, parameters


def check_losses(losses: dict[Name, float]) -> None:
    """Raises RuntimeError if the two models do not train alike."""
    for precision, tolerance in TOLERANCE.items():
        ours, theirs = losses["ours", precision], losses["transformers", precision]
        if abs(ours - theirs) > tolerance * theirs:
            raise RuntimeError(f"losses {losses} differ: the two do not train the same model")


def timed(step: Step) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds of all threads, loss."""
    start, worked = time.perf_counter(), time.process_time()
    loss = step()
    return time.perf_counter() - start, time.process_time() - worked, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--profile", choices=list(TOLERANCE), help="print where ours spends time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    tokens = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, TOKENS))
    steps, parameters = make_steps(tokens)
    for step in steps.values():
        step()
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    worked: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps):
        losses = {}
        for name, step in steps.items():
            spent, work, losses[name] = timed(step)
            seconds[name].append(spent)
            worked[name].append(work)
        check_losses(losses)
    console.print(
        f"{parameters / 1e6:.2f}M parameters, {SEQUENCES} x {TOKENS} tokens, {options.threads} "
        f"threads, torch {torch.__version__}, medians of {options.steps} steps"
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]) * 1e3:.0f}-{max(seconds[name]) * 1e3:.0f}"
        rate = SEQUENCES * TOKENS / median
        console.print(
            f"{' '.join(name):>18}: {median * 1e3:7.0f} ms a step ({spread}), {rate:8.0f} "
            f"tokens/s, {statistics.median(worked[name]):.2f} CPU seconds"
        )
    peer = min(medians["transformers", precision] for precision in TOLERANCE)
    for precision in TOLERANCE:
        ratio = peer / medians["ours", precision]
        console.print(f"{f'ratio, {precision}':>18}: {ratio:.2f} (goal >= {GOAL:.0f})")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            steps["ours", options.profile]()
        console.print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
