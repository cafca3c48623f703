"""Packed causal attention on one GPU, forward and backward, beside torch's own forms.

Run: python -m benchmarks.attention [--tokens 8192 32768 ...]

"Flash" is torch's own varlen kernel on the same packed tokens (what `varlen_attn` calls), "padded"
is `scaled_dot_product_attention` on right-padded batches of like length. TFLOP/s count what the
causal mask leaves: 2 n^2 D a head forward, 2.5 times that backward. Times are medians as in
`benchmarks/kernels.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernels import DEVICE, median_ms, say
from benchmarks.train_step import log_normal_lengths
from model.kernels.attention import forms, pieces
from model.kernels.attention.op import packed_attention
from model.kernels.attention.padded import padded_attention

HEAD_DIM = 128
# query heads, key heads
HEADS = ((16, 4), (64, 8))
TOKENS = (8192, 32_768, 65_536)
# one sequence of more tokens times heads takes minutes
MAX_WORK = 262_144 * 16
Attention = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


class Flash(torch.autograd.Function):
    """The peer: one flash call for all sequences."""

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        ctx.pieces = [forms.Piece("flash", tuple(lengths))]
        out, lse = pieces.forward(q, k, v, ctx.pieces)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *pieces.backward(grad, *ctx.saved_tensors, ctx.pieces), None


FORMS: dict[str, Attention] = {
    "ours": packed_attention,
    "flash": Flash.apply,
    "padded": padded_attention,
}


def time_forms(lengths: Sequence[int], heads: int, kv_heads: int) -> None:
    total = sum(lengths)
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(total, n, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    work = 2 * sum(n * n for n in lengths) * heads * HEAD_DIM
    repeats = 1 if work > 5e13 else 7
    times = {}
    for name, form in FORMS.items():
        with torch.no_grad():
            forward = median_ms(lambda form=form: form(*leaves, lengths), repeats)
        out = form(*leaves, lengths)
        backward = median_ms(
            lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True), repeats
        )
        times[name] = forward + backward
        say(
            f"  {name}: forward {forward:.3f} ms {work / forward * 1e-9:.0f} TFLOP/s, "
            f"backward {backward:.3f} ms {2.5 * work / backward * 1e-9:.0f} TFLOP/s, "
            f"together {times[name] / times['ours']:.2f} of ours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    tokens = parser.parse_args().tokens
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, D={HEAD_DIM}")
    for heads, kv_heads in HEADS:
        for total in tokens:
            if total * heads <= MAX_WORK:
                say(f"one sequence, T={total} H={heads} G={kv_heads}")
                time_forms([total], heads, kv_heads)
            lengths = log_normal_lengths(total)
            say(f"{len(lengths)} log-normal lengths, T={total} H={heads} G={kv_heads}")
            time_forms(lengths, heads, kv_heads)


if __name__ == "__main__":
    main()
