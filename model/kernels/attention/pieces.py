"""Which kernel computes which of the packed sequences, and the pieces put together again.

On a CPU all causal sequences go to C at once, where it was built. On one H200 (README.md) cuDNN is
about twice as fast as flash from 1,024 tokens on, but takes one sequence at a time and makes a plan
for each new length; flash takes any number of short sequences at once. So a long sequence goes to
cuDNN alone, and what lies between two long ones goes to flash together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from model.kernels.attention.forms import FORMS, Grads, Piece
from model.kernels.cpu import passes

# tokens from which a sequence goes to cuDNN alone, and elements of q that it never reaches: beyond
# 32-bit offsets it was not measured
LONG_TOKENS = 2048
MAX_CUDNN_ELEMENTS = 2**31
# a rectangle goes to cuDNN if both sides are multiples: without a mask no side can be padded, so
# that only shapes which come again are worth a plan
RECTANGLE_TOKENS = 1024
MAX_FLASH_SIZE, MAX_CUDNN_SIZE = 256, 128
# the widest bf16 head that goes to C, which multiplies in fp32: of wider ones torch's products, in
# bf16 where a processor has them, are faster
MAX_SHORT_SIZE = 64


def is_fused(q: Tensor) -> bool:
    """Whether a form with the log-sum-exp takes q [T, H, D] as it is."""
    if not q.is_cuda:
        return _runs_passes(q)
    if q.dtype in (torch.bfloat16, torch.float16):
        return q.shape[2] % 8 == 0 and q.shape[2] <= MAX_FLASH_SIZE
    return q.dtype == torch.float32 and q.shape[2] % 4 == 0


def _runs_passes(q: Tensor) -> bool:
    widest = MAX_SHORT_SIZE if passes.is_short(q) else passes.MAX_SIZE
    return passes.takes(q) and q.shape[2] <= widest


@functools.lru_cache(maxsize=16)
def _has_cudnn(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and (
        torch.cuda.get_device_capability(device)[0] >= 9
    )


def choose(
    q: Tensor, lengths: Sequence[int], key_lengths: Sequence[int] | None, window: int | None
) -> list[Piece]:
    """The pieces of a call, in order."""
    keys = None if key_lengths is None else tuple(key_lengths)
    if window is not None and window >= max(lengths):
        window = None
    if keys is None and _runs_passes(q):
        return [Piece("rows", tuple(lengths), None, window)]
    if not q.is_cuda:
        return [
            Piece("cpu", (length,), keys and (keys[i],), window) for i, length in enumerate(lengths)
        ]
    if q.dtype == torch.float32:
        return [Piece("efficient", tuple(lengths), keys, window)]
    longest = 0
    if window is None and q.shape[2] <= MAX_CUDNN_SIZE and _has_cudnn(q.device):
        longest = (MAX_CUDNN_ELEMENTS - 1) // q.shape[1:].numel() // RECTANGLE_TOKENS
        longest *= RECTANGLE_TOKENS
    if keys is None:
        return cut(lengths, window, range(LONG_TOKENS, longest + 1))
    sides = (*lengths, *keys)
    is_cudnn = (
        len(keys) == 1
        and max(sides) <= longest
        and not any(side % RECTANGLE_TOKENS for side in sides)
    )
    return [Piece("cudnn" if is_cudnn else "flash", tuple(lengths), keys)]


def cut(lengths: Sequence[int], window: int | None, long: range) -> list[Piece]:
    """Causal sequences: each of a `long` length alone, the others in runs.

    Example:
        >>> [(p.form, p.lengths) for p in cut([3, 9000, 2, 1], None, range(2048, 2**20))]
        [('flash', (3,)), ('cudnn', (9000,)), ('flash', (2, 1))]
    """
    pieces = []
    for is_long, run in groupby(lengths, lambda length: length in long):
        if is_long:
            pieces += [Piece("cudnn", (length,)) for length in run]
        else:
            pieces.append(Piece("flash", tuple(run), None, window))
    return pieces


def forward(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """out [T, H, D], lse [T, H]."""
    found = [
        FORMS[piece.form].forward(q[rows], k[keys], v[keys], piece)
        for piece, rows, keys in _places(pieces)
    ]
    out, lse = (_join(parts) for parts in zip(*found, strict=True))
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Sequence[Piece],
) -> Grads:
    grad = grad.contiguous()
    found = [
        FORMS[piece.form].backward(
            grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], piece
        )
        for piece, rows, keys in _places(pieces)
    ]
    dq, dk, dv = (_join(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _places(pieces: Sequence[Piece]) -> list[tuple[Piece, slice, slice]]:
    """Each piece with its queries' and its keys' rows."""
    places, row, key = [], 0, 0
    for piece in pieces:
        queries, keys = sum(piece.lengths), sum(piece.key_lengths or piece.lengths)
        places.append((piece, slice(row, row + queries), slice(key, key + keys)))
        row, key = row + queries, key + keys
    return places


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
