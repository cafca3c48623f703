"""One training step of a preset on one GPU: ours beside transformers' `minimax`.

Run: python -m benchmarks.train_step [--tokens 8192 32768] [--profile 30] [--compile]

Both models have the same shape and random bf16 weights and take turns in one process, each alone on
the device; forward + backward with the router's balance loss, then the same with a step of torch's
AdamW. Times are medians on the wall, the device awaited at the end; "host" is when the last launch
returned, so that host = total says that the host is what limits. Peak memory counts weights,
gradients and activations, no optimizer. MFU is of forward + backward, by `count_operations`.
`--optimizers` times the step of each way to keep weights (optim.weights).
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from align.peaks import named_peak
from align.wide_adamw import WideAdamW
from benchmarks.kernels import DEVICE, say
from model import HybridConfig, HybridForCausalLM, Packed
from model.checkpointing import Checkpointing
from model.config import PRESETS, count_operations, count_parameters, preset

PASSES = 5
Pass = Callable[[], Tensor]


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


def build(kind: type[nn.Module], config: HybridConfig, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
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


def with_checkpointing(model: HybridForCausalLM, kind: Checkpointing) -> HybridForCausalLM:
    model.model.checkpointing = kind
    return model


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


def show(name: str, operations: float, tokens: int, found: Measured) -> None:
    mfu = operations / found.seconds / named_peak(torch.cuda.get_device_name())
    say(
        f"  {name:>15}: {found.seconds * 1e3:7.1f} ms {tokens / found.seconds / 1e3:6.1f}k tok/s "
        f"MFU {mfu:.2f}, step {tokens / found.with_step / 1e3:6.1f}k, "
        f"host {found.host_seconds * 1e3:4.0f} ms, peak {found.peak_bytes / 1e9:5.1f} GB"
    )


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def profiled(run: Pass, rows: int) -> None:
    """Where the device's time of one pass goes, kernel by kernel."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
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
        say(f"  {spent / 1e3:8.2f} ms {spent / total:6.1%} x{event.count:<5} {event.key[:100]}")


def compare(config: HybridConfig, options: argparse.Namespace) -> None:
    ours = build(HybridForCausalLM, config)
    fastest: dict[int, float] = {}
    for tokens in options.tokens:
        say(f"{tokens} tokens")
        for kind in ("none", "selective", "full"):
            for name, lengths in (("one", [tokens]), ("packed", log_normal_lengths(tokens))):
                if name == "packed" and kind != "none":
                    continue
                run = our_pass(with_checkpointing(ours, kind), pack(lengths, config.vocab_size))
                found = measure(ours, run)
                fastest.setdefault(tokens, found.seconds)
                show(f"{kind}, {name}", count_operations(config, lengths).training, tokens, found)
                free()
        if options.profile:
            one = pack([tokens], config.vocab_size)
            profiled(our_pass(with_checkpointing(ours, "none"), one), options.profile)
            ours.zero_grad(set_to_none=True)
            free()
    if options.compile:
        compiled(ours, options.tokens)
    del ours, run
    free()
    if options.no_peer:
        return
    theirs = their_model(config)
    for tokens in options.tokens:
        say(f"{tokens} tokens")
        found = measure(theirs, their_pass(theirs, pack([tokens], config.vocab_size)), 3)
        show("transformers", count_operations(config, [tokens]).training, tokens, found)
        say(f"  {'ratio':>15}: {found.seconds / fastest[tokens]:.2f}")
        free()


def compiled(model: HybridForCausalLM, sizes: Sequence[int]) -> None:
    """Each block under torch.compile; the seconds that compiling took beside it."""
    for layer in with_checkpointing(model, "none").model.layers:
        layer.compile(dynamic=False)
    for tokens in sizes:
        run = our_pass(model, pack([tokens], model.config.vocab_size))
        seconds = timed(run)[0]
        found = measure(model, run)
        say(f"{tokens} tokens, compiled in {seconds:.0f} s")
        operations = count_operations(model.config, [tokens]).training
        show("compiled, one", operations, tokens, found)
        free()


def optimizers(config: HybridConfig) -> None:
    say("optimizer step alone")
    for weights in ("fp32", "bf16_master", "bf16_stochastic"):
        model = build(HybridForCausalLM, config)
        optimizer: torch.optim.Optimizer
        if weights == "fp32":
            optimizer = torch.optim.AdamW(model.float().parameters(), lr=1e-6, fused=True)
        else:
            is_stochastic = weights == "bf16_stochastic"
            optimizer = WideAdamW(model.parameters(), lr=1e-6, is_stochastic=is_stochastic)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        spent = statistics.median(timed(optimizer.step)[0] for _ in range(PASSES))
        peak = torch.cuda.max_memory_allocated() / 1e9
        say(f"  {weights:>15}: {spent * 1e3:7.1f} ms, peak {peak:5.1f} GB")
        del model, optimizer, parameter
        free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--profile", type=int, default=0, help="rows of kernels to print")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument("--optimizers", action="store_true", help="only the optimizers' steps")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    config = preset(options.preset)
    total, active, _ = count_parameters(config)
    say(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {options.preset}: "
        f"{total / 1e9:.2f}B parameters, {active / 1e9:.2f}B active"
    )
    if options.optimizers:
        optimizers(config)
    else:
        compare(config, options)


if __name__ == "__main__":
    main()
