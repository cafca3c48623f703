"""Lightning kernels on one GPU: error against fp64, time, bytes a second, and the peer beside them.

Run: python -m benchmarks.kernels [--part check|time|packed|decode|all]

The peer is fla's `chunk_simple_gla(g_gamma=-slope, scale=1.0)`, timed in the same process if it is
installed; its first call searches its own settings for about a minute. A time is the median of
several runs between two events, enqueued behind a pause long enough that launches are not counted.
"Floor" is the bytes that must move once over the bandwidth that a device copy reached.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model.kernels.lightning.blocks import lightning_blocks
from model.kernels.lightning.op import lightning_attention, lightning_step

PAUSE_CYCLES = 2_000_000
SIZES = ((32_768, 64), (131_072, 64), (262_144, 64), (1_048_576, 16))
HEAD_DIM = 128
DEVICE = torch.device("cuda")
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def median_ms(work: Callable[[], object], repeats: int = 11, *, pauses: int = 1) -> float:
    """Time on the device behind pauses long enough that the host has launched all of it."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(pauses * PAUSE_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: Sequence[int]) -> Tensor:
    return lightning_attention(q, k, v, slopes, lengths)[0]


def peer() -> Form | None:
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.simple_gla import chunk_simple_gla

    def form(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: Sequence[int]) -> Tensor:
        starts = None
        if len(lengths) > 1:
            starts = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
        out = chunk_simple_gla(
            q[None], k[None], v[None], g_gamma=-slopes, scale=1.0, cu_seqlens=starts
        )
        return out[0][0]

    return form


def make(total: int, heads: int, *, factor: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of o, random; the slopes of the first layer times `factor`."""
    torch.manual_seed(0)
    shape = (total, heads, HEAD_DIM)
    tensors = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.3 for _ in range(4)]
    slopes = factor * 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=DEVICE) / heads)
    return tensors, slopes


def both_ms(
    form: Form, tensors: Sequence[Tensor], slopes: Tensor, lengths: Sequence[int]
) -> tuple[float, float]:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    with torch.no_grad():
        forward = median_ms(lambda: form(*leaves, slopes, lengths))
    out = form(*leaves, slopes, lengths)
    backward = median_ms(lambda: torch.autograd.grad(out, leaves, tensors[3], retain_graph=True))
    return forward, backward


def error(found: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact."""
    found, exact = found.detach().double(), exact.detach().double()
    difference = (found - exact).square().mean().sqrt()
    return float(difference / exact.square().mean().sqrt())


def check() -> None:
    say("RMS error against fp64: o, dq, dk, dv, final, dinitial")
    cases = (([1000, 1, 65, 934], 3), ([4096], 4), ([1], 1), ([63, 64, 65], 5))
    for dtype, bound in ((torch.bfloat16, 5e-3), (torch.float32, 1e-5)):
        for size in (32, 64, 128, 256):
            worst = [0.0] * 6
            for lengths, heads in cases:
                found = _errors(lengths, heads, size, dtype)
                worst = [max(a, b) for a, b in zip(worst, found, strict=True)]
            verdict = "ok" if max(worst) <= bound else f"ABOVE {bound:.0e}"
            say(f"  {dtype} D={size}: {' '.join(f'{x:.1e}' for x in worst)} {verdict}")


def _errors(lengths: Sequence[int], heads: int, size: int, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(1)
    total, count = sum(lengths), len(lengths)
    qkv = torch.randn(total, heads, 3 * size, device=DEVICE).to(dtype)
    state = torch.randn(count, heads, size, size, device=DEVICE)
    weights = [torch.randn(total, heads, size, device=DEVICE), torch.randn_like(state)]
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=DEVICE) / heads)
    results = []
    for form, wide in ((lightning_attention, None), (lightning_blocks, torch.float64)):
        leaf = qkv.to(wide or dtype, copy=True).requires_grad_()
        start = state.to(wide or torch.float32, copy=True).requires_grad_()
        q, k, v = leaf.chunk(3, dim=-1)
        out, final = form(q, k, v, slopes, lengths, initial_state=start, with_final=True)
        loss = (out * weights[0]).sum() + (final * weights[1]).sum()
        gradient, dstart = torch.autograd.grad(loss, (leaf, start))
        results.append((out, *gradient.chunk(3, dim=-1), final, dstart))
    return [error(a, b) for a, b in zip(*results, strict=True)]


def copy_bandwidth() -> float:
    """Bytes a second of a device copy, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def time_sizes(form: Form | None) -> None:
    bandwidth = copy_bandwidth()
    say(f"device copy {bandwidth / 1e12:.2f} TB/s; times in ms: forward, backward, together")
    for total, heads in SIZES:
        row_bytes = total * heads * HEAD_DIM * 2
        floor = [count * row_bytes / bandwidth * 1e3 for count in (4, 7)]
        tensors, slopes = make(total, heads)
        mine = both_ms(ours, tensors, slopes, [total])
        slow = both_ms(ours, tensors, slopes * 1e-5, [total])
        say(f"T={total} H={heads}: {_row(mine)}; slowest decay {_row(slow)}; floor {_row(floor)}")
        if form is not None:
            other = both_ms(form, tensors, slopes, [total])
            ratios = [a / b for a, b in zip((*other, sum(other)), (*mine, sum(mine)), strict=True)]
            say(f"    fla {_row(other)}; ratios {' '.join(f'{x:.2f}' for x in ratios)}")


def _row(times: Sequence[float]) -> str:
    return f"{times[0]:.3f} {times[1]:.3f} {sum(times):.3f}"


def time_packed(form: Form | None) -> None:
    total, heads = 131_072, 64
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = math.log(400) + float(torch.randn((), generator=generator))
        lengths.append(min(max(int(math.exp(drawn)), 1), total - sum(lengths)))
    tensors, slopes = make(total, heads)
    one, many = (both_ms(ours, tensors, slopes, n) for n in ([total], lengths))
    say(f"packed: {len(lengths)} log-normal lengths, {_row(many)}; one sequence {_row(one)}; "
        f"ratio {sum(many) / sum(one):.2f}")  # fmt: skip
    if form is not None:
        say(f"    fla {_row(both_ms(form, tensors, slopes, lengths))}")


def time_decode() -> None:
    heads, bandwidth = 64, copy_bandwidth()
    for count in (1, 32, 256):
        states = torch.randn(count + 8, heads, HEAD_DIM, HEAD_DIM, device=DEVICE)
        index = torch.randperm(count + 8, device=DEVICE)[:count]
        (q, k, v, _), slopes = make(count, heads)
        step = partial(lightning_step, q, k, v, slopes, states, index)
        found = median_ms(step)
        floor = 2 * count * heads * HEAD_DIM**2 * 4 / bandwidth * 1e3
        say(f"decode {count} sequences: {found * 1e3:.1f} us, floor {floor * 1e3:.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", default="all", choices=("all", "check", "time", "packed", "decode")
    )
    part = parser.parse_args().part
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, D={HEAD_DIM}")
    if part in ("all", "check"):
        check()
    form = peer() if part in ("all", "time", "packed") else None
    if part in ("all", "time"):
        time_sizes(form)
    if part in ("all", "packed"):
        time_packed(form)
    if part in ("all", "decode"):
        time_decode()


if __name__ == "__main__":
    main()
