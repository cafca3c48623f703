"""One training step of a preset on one GPU: ours beside transformers' `minimax`.

Run: PYTHONPATH=. python benchmarks/train_step.py [--tokens 8192 32768] [--profile]

Both models have the same shape and random bf16 weights and take turns in one process, each alone on
the device; forward + backward with the router's balance loss, then the optimizer's step beside it.
Times are medians on the wall, device awaited at the end of a step. Peak memory counts weights,
gradients and activations, no optimizer.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from model import HybridConfig, HybridForCausalLM, Packed
from model.config import PRESETS, count_parameters, preset

DEVICE = torch.device("cuda")
PASSES = 5
Pass = Callable[[], Tensor]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Measured:
    """Median seconds of forward + backward, of the same with the optimizer, host's share, bytes."""

    seconds: float
    with_step: float
    host_seconds: float
    peak_bytes: int


def log_normal_lengths(total: int) -> list[int]:
    """Lengths with median 400 that sum to `total`."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = math.log(400) + float(torch.randn((), generator=generator))
        lengths.append(min(max(int(math.exp(drawn)), 1), total - sum(lengths)))
    return lengths


def pack(lengths: Sequence[int], vocabulary: int) -> Packed:
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (sum(lengths),), device=DEVICE)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    return Packed(tokens, positions, tuple(lengths))


def build(kind: type[nn.Module], config: HybridConfig) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = kind(config)
        torch.set_default_dtype(default)
    return model.train()


def our_pass(model: HybridForCausalLM, packed: Packed) -> Pass:
    targets = packed.tokens.roll(-1)
    weights = torch.ones_like(targets, dtype=torch.float32) / packed.num_tokens

    def run() -> Tensor:
        out = model(packed=packed, targets=targets)
        loss = out.aux_loss - (out.logprobs * weights).sum()
        loss.backward()
        return loss

    return run


def their_pass(model: MiniMaxForCausalLM, packed: Packed) -> Pass:
    tokens = packed.tokens[None]

    def run() -> Tensor:
        out = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
        out.loss.backward()
        return out.loss

    return run


def their_model(config: HybridConfig) -> MiniMaxForCausalLM:
    keys = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "rotary_dim")}
    theirs = MiniMaxConfig(**keys)
    theirs._attn_implementation = "sdpa"
    theirs._experts_implementation = "grouped_mm"
    return build(MiniMaxForCausalLM, theirs)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter() - start, launched - start


def measure(model: nn.Module, run: Pass, passes: int = PASSES) -> Measured:
    def clear() -> None:
        model.zero_grad(set_to_none=True)

    run()
    clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(passes):
        times.append(timed(run))
        clear()
    peak = torch.cuda.max_memory_allocated()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        run()
        optimizer.step()

    step()
    clear()
    stepped = []
    for _ in range(passes):
        stepped.append(timed(step)[0])
        clear()
    return Measured(
        seconds=statistics.median(t for t, _ in times),
        with_step=statistics.median(stepped),
        host_seconds=statistics.median(h for _, h in times),
        peak_bytes=peak,
    )


def show(name: str, tokens: int, found: Measured) -> None:
    say(
        f"  {name:>16}: {found.seconds * 1e3:8.1f} ms {tokens / found.seconds / 1e3:6.1f}k tok/s, "
        f"step {tokens / found.with_step / 1e3:6.1f}k, host {found.host_seconds * 1e3:.0f} ms, "
        f"peak {found.peak_bytes / 1e9:.1f} GB"
    )


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def profiled(run: Pass, rows: int) -> None:
    """Where the device's time of one pass goes, kernel by kernel."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total
    ]
    total = sum(event.self_device_time_total for event in kernels)
    say(f"  kernels {total / 1e3:.1f} ms together")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:rows]:
        spent = event.self_device_time_total
        say(f"  {spent / 1e3:8.2f} ms {spent / total:6.1%} x{event.count:<5} {event.key[:110]}")


def compare(config: HybridConfig, sizes: Sequence[int], peer: bool, rows: int) -> None:
    ours = build(HybridForCausalLM, config)
    seen: dict[int, Measured] = {}
    for tokens in sizes:
        say(f"{tokens} tokens")
        for name, lengths in (("one", [tokens]), ("packed", log_normal_lengths(tokens))):
            run = our_pass(ours, pack(lengths, config.vocab_size))
            found = measure(ours, run)
            seen.setdefault(tokens, found)
            show(f"ours, {name}", tokens, found)
            free()
        if rows:
            profiled(our_pass(ours, pack([tokens], config.vocab_size)), rows)
            ours.zero_grad(set_to_none=True)
            free()
    del ours, run
    free()
    if not peer:
        return
    theirs = their_model(config)
    for tokens in sizes:
        found = measure(theirs, their_pass(theirs, pack([tokens], config.vocab_size)), 3)
        say(f"{tokens} tokens")
        show("transformers", tokens, found)
        say(f"  {'ratio':>16}: {found.seconds / seen[tokens].seconds:.2f}")
        free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--profile", type=int, default=0, help="rows of kernels to print")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    config = preset(options.preset)
    total, active, _ = count_parameters(config)
    say(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {options.preset}: "
        f"{total / 1e9:.2f}B parameters, {active / 1e9:.2f}B active"
    )
    compare(config, options.tokens, not options.no_peer, options.profile)


if __name__ == "__main__":
    main()
