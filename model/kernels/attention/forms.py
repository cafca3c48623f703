"""The attention kernels that torch brings, and the one in C for a CPU: each a forward with the
log-sum-exp, and a backward.

A backward takes `out` and `lse` as they are: those of the piece itself, or, where the keys are cut
into pieces, those of the merged whole. P = exp(s - lse) and delta = sum(grad * out) are then the
whole's, and what comes back is the piece's exact share of each gradient.

All tensors are [T, heads, D]; lse is [T, H] fp32 (fp64 stays).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu import passes

aten = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Piece:
    """Sequences whose queries stand in a row, as do their keys.

    Args:
        form: key of FORMS, who computes it.
        lengths: queries of each sequence.
        key_lengths: keys of each sequence, all seen by its queries; None: as many keys as queries,
            under the causal mask.
        window: tokens that a query sees, itself included; None sees all.
    """

    form: str
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    window: int | None = None


@dataclass(frozen=True)
class Form:
    forward: Callable[[Tensor, Tensor, Tensor, Piece], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Piece], Grads]


@functools.lru_cache(maxsize=256)
def starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[S + 1] int32: where each sequence starts, and T."""
    table = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return _to_device(table, device)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # from pinned memory, so that the host does not wait for the device
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def padded_length(length: int) -> int:
    """Up to the next sixteenth of an octave or 1,024: cuDNN takes 0.05 s to plan a new length."""
    unit = min(max(1 << max((length - 1).bit_length() - 5, 0), 8), 1024)
    return -(-length // unit) * unit


def _as_batch(x: Tensor, length: int) -> Tensor:
    """[T, heads, D] -> [1, heads, length, D], zeros behind T, which no causal query sees."""
    short = length - x.shape[0]
    return (F.pad(x, (0, 0, 0, 0, 0, short)) if short else x)[None].transpose(1, 2)


def _cudnn_sizes(q: Tensor, k: Tensor, piece: Piece) -> tuple[int, int]:
    if piece.key_lengths is not None:
        return q.shape[0], k.shape[0]
    return (padded_length(q.shape[0]),) * 2


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    queries, keys = _cudnn_sizes(q, k, piece)
    out, lse = aten._scaled_dot_product_cudnn_attention(
        _as_batch(q, queries), _as_batch(k, keys), _as_batch(v, keys),
        None, True, 0.0, piece.key_lengths is None, False,
    )[:2]  # fmt: skip
    total = q.shape[0]
    return out[0].transpose(0, 1)[:total], lse.reshape(q.shape[1], queries).t()[:total]


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece
) -> Grads:
    queries, keys = _cudnn_sizes(q, k, piece)
    # [T, H] -> [1, H, T, 1] dense; a padded query has no gradient, whatever its lse
    stats = F.pad(lse, (0, 0, 0, queries - q.shape[0])).t().contiguous()[None, :, :, None]
    # without dropout no seed is read
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        _as_batch(grad, queries), _as_batch(q, queries), _as_batch(k, keys), _as_batch(v, keys),
        _as_batch(out, queries), stats, seed, seed, None, None, None, queries, keys,
        0.0, piece.key_lengths is None,
    )  # fmt: skip
    return (
        dq[0].transpose(0, 1)[: q.shape[0]],
        dk[0].transpose(0, 1)[: k.shape[0]],
        dv[0].transpose(0, 1)[: k.shape[0]],
    )


def _flash_layout(q: Tensor, piece: Piece) -> tuple[tuple[object, ...], dict[str, int]]:
    keys = piece.key_lengths or piece.lengths
    layout = (
        starts(piece.lengths, q.device), starts(keys, q.device), max(piece.lengths), max(keys),
        0.0, piece.key_lengths is None,
    )  # fmt: skip
    if piece.window is None:
        return layout, {}
    return layout, {"window_size_left": piece.window - 1, "window_size_right": 0}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    layout, window = _flash_layout(q, piece)
    out, lse = aten._flash_attention_forward(q, k, v, *layout, False, **window)[:2]
    return out, lse.t()


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece
) -> Grads:
    layout, window = _flash_layout(q, piece)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    return aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, lse.t().contiguous(), *layout, seed, seed, **window
    )


@functools.lru_cache(maxsize=256)
def _padded_rows(lengths: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """[T] int64: row of each token in [S, longest]."""
    rows = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    return _to_device(rows, device)


def _efficient_layout(q: Tensor, piece: Piece) -> tuple[object, ...]:
    keys = piece.key_lengths or piece.lengths
    return starts(piece.lengths, q.device), starts(keys, q.device), max(piece.lengths), max(keys)


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)[None]


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out, lse = aten._efficient_attention_forward(
        q[None], _all_heads(k, heads), _all_heads(v, heads), None, *_efficient_layout(q, piece),
        0.0, int(piece.key_lengths is None), True, window_size=piece.window,
    )[:2]  # fmt: skip
    # [S, H, longest, rounded up] -> [T, H]
    rows = _padded_rows(piece.lengths, lse.shape[2], q.device)
    return out[0], lse.transpose(1, 2).flatten(0, 1).index_select(0, rows)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece
) -> Grads:
    heads, count = q.shape[1], len(piece.lengths)
    # the kernel reads whole blocks of 32 queries; inf gives those behind the end no weight
    longest = -(-max(piece.lengths) // 32) * 32
    rows = _padded_rows(piece.lengths, longest, q.device)
    stats = lse.new_full((count * longest, heads), math.inf).index_copy(0, rows, lse)
    stats = stats.view(count, longest, heads).transpose(1, 2).contiguous()
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._efficient_attention_backward(
        grad[None].contiguous(), q[None], _all_heads(k, heads), _all_heads(v, heads), None,
        out[None], *_efficient_layout(q, piece), stats, 0.0, seed, seed,
        int(piece.key_lengths is None), False, window_size=piece.window,
    )  # fmt: skip
    shared = (*k.shape[:2], heads // k.shape[1], k.shape[2])
    return dq[0], dk[0].view(shared).sum(2), dv[0].view(shared).sum(2)


def _cpu_mask(q: Tensor, k: Tensor, piece: Piece) -> dict[str, Tensor | bool | None]:
    if piece.window is None or piece.window >= k.shape[0]:
        return {"is_causal": piece.key_lengths is None, "attn_mask": None}
    place = torch.arange(q.shape[0])
    behind = place[:, None] - place[None, :]
    seen = (behind >= 0) & (behind < piece.window)
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    return {"is_causal": False, "attn_mask": mask}


def _batch(*tensors: Tensor) -> list[Tensor]:
    return [x[None].transpose(1, 2) for x in tensors]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    mask = _cpu_mask(q, k, piece)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_batch(q, k, v), 0.0, **mask)
    return out[0].transpose(0, 1), lse[0].t()


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece
) -> Grads:
    mask = _cpu_mask(q, k, piece)
    causal, bias = mask["is_causal"], mask["attn_mask"]
    stats = lse.contiguous()[None].transpose(1, 2)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_batch(grad, q, k, v, out), stats, 0.0, causal, attn_mask=bias
    )
    dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
    return dq, dk, dv


def _dense(**rows: Tensor) -> dict[str, Tensor]:
    return {name: x if x.stride(2) == 1 else x.contiguous() for name, x in rows.items()}


def _rows_forward(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32).t()
    rows = _dense(q=q, k=k, v=v)
    passes.attention("attention_fwd", {**rows, "out": out}, lse, piece.lengths, piece.window)
    return out, lse


def _rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece
) -> Grads:
    rows = _dense(grad=grad, q=q, k=k, v=v, out=out)
    grads = {f"to_{name}": torch.empty(rows[name].shape, dtype=q.dtype) for name in "qkv"}
    passes.attention("attention_bwd", {**rows, **grads}, lse, piece.lengths, piece.window)
    return grads["to_q"], grads["to_k"], grads["to_v"]


FORMS = {
    "cudnn": Form(_cudnn_forward, _cudnn_backward),
    "flash": Form(_flash_forward, _flash_backward),
    "efficient": Form(_efficient_forward, _efficient_backward),
    "cpu": Form(_cpu_forward, _cpu_backward),
    "rows": Form(_rows_forward, _rows_backward),
}
