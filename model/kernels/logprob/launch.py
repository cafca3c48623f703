"""Launches the fused head: forward without logits in memory, backward with one piece of slopes.

Forward is one product whose tiles end in three sums a token. Backward computes the tiles again,
writes the slopes dL/dz of a piece in the dtype of the weight, and multiplies them twice by cuBLAS.
A piece is a range of the vocabulary when T <= V, so that a piece's weight gradient is done at once
and only the hidden gradient is summed over pieces (fp32 [T, C]); else a range of tokens, and the
weight gradient is summed (fp32 [V, C]).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.logprob import kernel

# tile of tokens by vocabulary, 8 warps: as measured on one H200
TILE = {"BM": 256, "BN": 128, "BK": 64, "GROUP": 8}
LAUNCH = {"num_warps": 8, "num_stages": 4}
# tile of tokens by partial sums
MERGE = {"BM": 128, "BN": 16}
# slopes that exist at once
PIECE_BYTES = 2**29


def token_logprobs_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` for hidden and weight of one 16-bit dtype, rows dense and on 16 bytes."""
    return _TokenLogprobs.apply(hidden, weight, targets, temperature)


def can_copy(x: Tensor) -> bool:
    """Whether bulk copies can read this matrix: dense rows, address and row stride on 16 bytes."""
    stride = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and stride % 16 == 0 and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, TILE["BK"]])


def _num_tiles(total: int, vocabulary: int) -> int:
    return triton.cdiv(total, TILE["BM"]) * triton.cdiv(vocabulary, TILE["BN"])


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        total, width = hidden.shape
        vocabulary = weight.shape[0]
        num_n = triton.cdiv(vocabulary, TILE["BN"])
        tiles = hidden.new_empty((3, num_n, total), dtype=torch.float32)
        # a target outside the vocabulary is never met, and must not look like a number
        picked = torch.full_like(targets, math.nan, dtype=torch.float32)
        kernel.logprob_fwd_tiles[(_num_tiles(total, vocabulary),)](
            _descriptor(hidden, TILE["BM"]), _descriptor(weight, TILE["BN"]), targets,
            tiles[0], tiles[1], tiles[2], picked,
            total, vocabulary, width, math.log2(math.e) / temperature, **TILE, **LAUNCH,
        )  # fmt: skip
        logprobs, entropy, normaliser = picked.new_empty(3, total).unbind(0)
        kernel.logprob_fwd_merge[(triton.cdiv(total, MERGE["BM"]),)](
            tiles[0], tiles[1], tiles[2], picked, logprobs, entropy, normaliser,
            total, num_n, **MERGE, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        total, vocabulary = hidden.shape[0], weight.shape[0]
        grad = (grad / ctx.temperature).contiguous()
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        by_vocabulary = total <= vocabulary
        # one gradient is done piece by piece, the other is a sum over pieces
        done, summed = (weight, hidden) if by_vocabulary else (hidden, weight)
        needs_done, needs_sum = (
            (needs_weight, needs_hidden) if by_vocabulary else (needs_hidden, needs_weight)
        )
        grad_done = torch.empty_like(done) if needs_done else None
        grad_sum: Tensor | None = None
        everything = slice(None)
        for piece in _pieces(done.shape[0], summed.shape[0] * weight.element_size()):
            rows, columns = (everything, piece) if by_vocabulary else (piece, everything)
            slope = _slope(
                hidden[rows], weight[columns], targets[rows], normaliser[rows], grad[rows],
                first=piece.start if by_vocabulary else 0, temperature=ctx.temperature,
            )  # fmt: skip
            if by_vocabulary:
                slope = slope.t()
            if grad_done is not None:
                torch.mm(slope, summed, out=grad_done[piece])
            if needs_sum:
                grad_sum = _add_product(grad_sum, slope.t(), done[piece])
        if grad_sum is not None:
            grad_sum = grad_sum.to(weight.dtype)
        grads = (grad_sum, grad_done) if by_vocabulary else (grad_done, grad_sum)
        return *grads, None, None


def _pieces(count: int, bytes_each: int) -> Iterator[slice]:
    """0 .. count in steps that fill PIECE_BYTES, whole tiles each."""
    step = max(PIECE_BYTES // bytes_each // 256, 1) * 256
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _add_product(onto: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """onto + a b in fp32: a sum of products rounded to 16 bits would lose small terms."""
    if not a.is_cuda:
        product = a.float() @ b.float()
        return product if onto is None else onto.add_(product)
    if onto is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(onto, a, b, out_dtype=torch.float32, out=onto)


def _slope(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    *,
    first: int,
    temperature: float,
) -> Tensor:
    """[T, V] of one piece, in the dtype of the weight."""
    (total, width), vocabulary = hidden.shape, weight.shape[0]
    slope = weight.new_empty(total, vocabulary)
    kernel.logprob_bwd_slope[(_num_tiles(total, vocabulary),)](
        _descriptor(hidden, TILE["BM"]), _descriptor(weight, TILE["BN"]), targets, normaliser,
        grad, slope, total, vocabulary, width, first, math.log2(math.e) / temperature,
        **TILE, **LAUNCH,
    )  # fmt: skip
    return slope
