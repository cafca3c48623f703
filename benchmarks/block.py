"""The block around attention on one GPU: time of each op, beside its byte floor and its torch form.

Run: python -m benchmarks.block [--tokens 32768]

bf16. "Floor" is the bytes that must move once over the bandwidth that a device copy reached; share
is floor over time (goal >= 80 %). A time is the median of several runs between two events, enqueued
behind a pause long enough that launches are not counted. Backward is what autograd runs, with the
sum of the weight's gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import DEVICE, copy_bandwidth, median_ms, say
from model.kernels.norm.op import gated_norm, join_norm, rms_norm
from model.kernels.qkv.op import silu_qkv
from model.kernels.rotary.op import rotate
from model.rotary import rotary_angles

GOAL = 0.8
EPS, ALPHA = 1e-6, 3.5565588200778455


@dataclass
class Op:
    """One op with its inputs.

    Args:
        forward, backward: bytes that must move once.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]
    forward: int
    backward: int


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


def ops_of_width(total: int, size: int) -> list[Op]:
    """The norms of a hidden size; a pass over one [T, C] is the unit of their bytes."""
    x, branch, weight = noise(total, size), noise(total, size), noise(size)
    unit = 2 * total * size

    def carried(x: Tensor, weight: Tensor, *, form: str) -> tuple[Tensor, ...]:
        return join_norm(x, None, weight, EPS, form=form)

    def join(x: Tensor, branch: Tensor, weight: Tensor, *, postnorm: bool, form: str) -> tuple:
        gain = (ALPHA, 1.0) if postnorm else (1.0, 1.0)
        return join_norm(x, branch, weight, EPS, gain=gain, postnorm=postnorm, form=form)

    post, pre = (partial(join, postnorm=flag) for flag in (True, False))
    plain = partial(rms_norm, eps=EPS)
    three = (x, branch, weight)
    return [
        Op(f"norm {size}", plain, (x, weight), 2 * unit, 3 * unit),
        Op(f"norm, carried {size}", carried, (x, weight), 2 * unit, 4 * unit),
        Op(f"join, norm {size} (PostNorm)", post, three, 3 * unit, 6 * unit),
        Op(f"join, norm {size} (PreNorm)", pre, three, 4 * unit, 4 * unit),
    ]


def ops_of_heads(total: int, heads: int, kv_heads: int, dim: int) -> list[Op]:
    """The ops over H * D channels; the unit of bytes is again one [T, H * D]."""
    width = heads * dim
    x, gate, weight, qkv = (noise(total, width), noise(total, width), noise(width),
                            noise(total, 3 * width))  # fmt: skip
    q, k = noise(total, heads, dim), noise(total, kv_heads, dim)
    angles = rotary_angles(torch.arange(total, device=DEVICE), dim // 2, 1e7)
    unit = 2 * total * width
    both = 2 * (q.numel() + k.numel()) * 2

    def turn(q: Tensor, k: Tensor, *, form: str) -> tuple[Tensor, ...]:
        return rotate(q, k, *angles, form=form)

    def silu(x: Tensor, *, form: str) -> tuple[Tensor, ...]:
        return silu_qkv(x, heads, form=form)

    gated = partial(gated_norm, eps=EPS)
    return [
        Op(f"gated norm {width}", gated, (x, gate, weight), 3 * unit, 5 * unit),
        Op(f"silu of qkv 3x{width}", silu, (qkv,), 6 * unit, 9 * unit),
        Op(f"rotary {heads}+{kv_heads} heads", turn, (q, k), both, both),
    ]


def times_ms(op: Op, form: str) -> tuple[float, float]:
    function = partial(op.function, form=form)
    with torch.no_grad():
        forward = median_ms(lambda: function(*op.leaves))
    found = function(*op.leaves)
    outputs = (found,) if isinstance(found, Tensor) else found
    # dense, as attention and linear layers give them back
    grads = [torch.randn(out.shape, device=DEVICE).to(out.dtype) for out in outputs]
    backward = median_ms(lambda: torch.autograd.grad(outputs, op.leaves, grads, retain_graph=True))
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_768)
    total = parser.parse_args().tokens
    bandwidth = copy_bandwidth()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T = {total}, bf16; "
        f"device copy {bandwidth / 1e12:.2f} TB/s; us")  # fmt: skip
    ops = [*ops_of_width(total, 2048), *ops_of_heads(total, 16, 4, 128)]
    for op in (*ops, *ops_of_width(total, 6144), *ops_of_heads(total, 64, 8, 128)):
        mine, torchs = times_ms(op, "auto"), times_ms(op, "torch")
        columns = [f"{op.name:<28}"]
        for way, own, other, count in zip(
            ("fwd", "bwd"), mine, torchs, (op.forward, op.backward), strict=True
        ):
            floor = count / bandwidth * 1e3
            share = floor / own
            mark = " " if share >= GOAL else "<"
            columns.append(f"{way} {own * 1e3:7.0f} floor {floor * 1e3:6.0f} "
                           f"{share:4.0%}{mark} torch {other / own:4.1f}x")  # fmt: skip
        say(" | ".join(columns))


if __name__ == "__main__":
    main()
