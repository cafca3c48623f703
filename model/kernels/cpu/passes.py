"""Calls of the C files here: passes of a CPU over rows, of which torch makes many.

setup.py builds the C files where a compiler is; where they were not built `takes` says no, and an
op's torch form serves. Callers check shapes: here are addresses only.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# rows whose sums make one row of partial sums of a weight's gradient, as in passes.c
ROWS = 64
# the widest head that silu_qkv, lightning and attention take
MAX_SIZE = 256

_POINTER, _INT64, _FLAG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Norm(ctypes.Structure):
    """The struct of this name in passes.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "branch", "gate", "weight")),
        *((name, _INT64) for name in ("x_step", "other_step", "columns")),
        *((name, _FLOAT) for name in ("alpha", "beta", "eps")),
        *((name, _FLAG) for name in ("is_short", "is_other_short")),
    ]


class NormGrads(ctypes.Structure):
    """The struct of this name in passes.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("out", "twin", "sum", "x", "other", "weight")),
        *((name, _INT64) for name in ("out_step", "twin_step", "sum_step")),
    ]


class Rows(ctypes.Structure):
    """The struct of this name in products.h."""

    _fields_ = [("at", _POINTER), ("step", _INT64), ("head_step", _INT64)]


class Lightning(ctypes.Structure):
    """The struct of this name in lightning.c."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "out", "to_q", "to_k", "to_v")),
        *((name, _POINTER) for name in ("powers", "initial", "to_final", "final", "to_initial")),
        *(("starts", _POINTER), ("heads", _INT64), ("size", _INT64), ("is_short", _FLAG)),
    ]


class LightningStep(ctypes.Structure):
    """The struct Step in lightning.c."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "out")),
        *((name, _POINTER) for name in ("states", "decay", "index")),
        *((name, _INT64) for name in ("slot_step", "heads", "size")),
        ("is_short", _FLAG),
    ]


class Attention(ctypes.Structure):
    """The struct of this name in attention.c."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "out", "grad", "to_q", "to_k", "to_v")),
        *(("lse", _POINTER), ("lse_step", _INT64), ("lse_head_step", _INT64), ("starts", _POINTER)),
        *((name, _INT64) for name in ("heads", "key_heads", "size", "window")),
        *(("scale", _FLOAT), ("is_short", _FLAG)),
    ]


_ARGUMENTS = {
    "attention_fwd": [_POINTER, _INT64, _FLAG],
    "attention_bwd": [_POINTER, _INT64, _FLAG],
    "attention_one": [_POINTER, _INT64, _FLAG],
    "lightning_fwd": [_POINTER, _INT64, _FLAG],
    "lightning_bwd": [_POINTER, _INT64, _FLAG],
    "lightning_step": [_POINTER, _INT64, _FLAG],
    "swiglu_fwd": [_POINTER] * 2 + [_INT64] * 2 + [_FLAG] * 2,
    "swiglu_bwd": [_POINTER] * 5 + [_INT64] * 2 + [_FLAG] * 2,
    "add_rows": [_POINTER] * 4 + [_INT64] * 2 + [_FLAG] * 2,
    "norm_fwd": [_POINTER] * 4 + [_INT64, _FLAG],
    "norm_bwd": [_POINTER] * 3 + [_INT64, _FLAG],
    "qkv_fwd": [_POINTER] * 2 + [_INT64] * 3 + [_FLAG] * 2,
    "softmax_fwd": [_POINTER] * 3 + [_INT64] * 2 + [_FLOAT, _FLAG],
    "softmax_bwd": [_POINTER] * 4 + [_INT64] * 2 + [_FLAG],
    "qkv_bwd": [_POINTER] * 4 + [_INT64] * 3 + [_FLAG] * 2,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """What was built of the C files, or None."""
    found = importlib.util.find_spec("model.kernels.cpu._passes")
    if found is None or found.origin is None:
        return None
    built = ctypes.CDLL(found.origin)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, None
    return built


def takes(*tensors: Tensor | None) -> bool:
    """Whether the passes are there and take tensors of these dtypes, on these devices."""
    return (
        all(x is None or (x.device.type == "cpu" and x.dtype in DTYPES) for x in tensors)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def call(name: str, *arguments: object) -> None:
    """The pass of this name, with torch's number of threads; a tensor goes as its address."""
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(library(), name)(*given, torch.get_num_threads())


def is_short(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def dense_rows(x: Tensor) -> Tensor:
    """[.., C] -> [T, C] whose rows are dense; a copy only where they are not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def swiglu(inner: Tensor) -> Tensor:
    """silu(g) * u of [g | u]: [n, 2F] -> [n, F]."""
    inner = inner.contiguous()
    out = inner.new_empty(inner.shape[0], inner.shape[1] // 2)
    call("swiglu_fwd", inner, out, *out.shape, is_short(inner))
    return out


def swiglu_grad(inner: Tensor, back: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient `back` [n, F] of silu(g) * u, before it is scaled, gives.

    Args:
        inner: [n, 2F]; scale: [n, 1], of each row.

    Returns: scale * silu(g) * u [n, F], in the memory of back; the gradient of inner; that of
        scale, [n, 1].
    """
    inner, back, scale = inner.contiguous(), back.contiguous(), scale.contiguous()
    slope, dots = torch.empty_like(inner), torch.empty_like(scale)
    call("swiglu_bwd", inner, back, scale, slope, dots, *back.shape, is_short(inner))
    return back, slope, dots


def add_rows(out: Tensor, row: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
    """out[row] += scale * x, one row after the other: [.., C], [n], [m >= n, C], [m, 1]."""
    x = x.contiguous()
    scale = None if scale is None else scale.contiguous()
    call("add_rows", out, row, x, scale, len(row), out.shape[1], is_short(out))


def softmax(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target [T], and the probabilities in the memory of logits [T, V].

    Raises:
        ValueError: if a target is none of the V.
    """
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(
            f"targets {int(targets.min())} to {int(targets.max())}: expected 0 to "
            f"{logits.shape[1] - 1}"
        )
    logits, targets = logits.contiguous(), targets.contiguous()
    logprobs = logits.new_empty(len(logits))
    call("softmax_fwd", logits, targets, logprobs, *logits.shape, temperature)
    return logprobs, logits


def softmax_grad(probabilities: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """(1[v = target] - p_v) * share: [T, V], [T], [T] -> [T, V]."""
    probabilities, targets, share = (x.contiguous() for x in (probabilities, targets, share))
    slope = torch.empty_like(probabilities)
    call("softmax_bwd", probabilities, targets, share, slope, *slope.shape)
    return slope


def silu_qkv(x: Tensor, heads: int) -> Tensor:
    """[T, 3 H D] -> silu of it, [3, H, T, D]; D <= MAX_SIZE."""
    x = x.contiguous()
    out = x.new_empty(3, heads, x.shape[0], x.shape[1] // (3 * heads))
    call("qkv_fwd", x, out, x.shape[0], heads, out.shape[3], is_short(x))
    return out


def silu_qkv_grad(x: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Gradient of x [T, 3 H D] from those of q, k and v, [T, H, D] each."""
    x = x.contiguous()
    grads = [grad if grad.stride(2) == 1 else grad.contiguous() for grad in grads]
    rows, heads, size = grads[0].shape
    out = torch.empty_like(x)
    addresses = (_POINTER * 3)(*(grad.data_ptr() for grad in grads))
    steps = (_INT64 * 6)(*(step for grad in grads for step in grad.stride()[:2]))
    call("qkv_bwd", x, addresses, steps, out, rows, heads, size, is_short(x))
    return out


def lightning(
    name: str,
    rows: dict[str, Tensor],
    states: dict[str, Tensor | None],
    powers: Tensor,
    lengths: Sequence[int],
) -> None:
    """`lightning_fwd` or `lightning_bwd`: [T, H, D] and [S, H, D, D] by their names in C."""
    q, starts = rows["q"], _starts(lengths)
    given = Lightning(
        powers=powers.data_ptr(), starts=ctypes.addressof(starts),
        heads=q.shape[1], size=q.shape[2], is_short=is_short(q), **_rows(rows),
        **{key: x.data_ptr() for key, x in states.items() if x is not None},
    )  # fmt: skip
    call(name, ctypes.byref(given), len(lengths))


def lightning_step(rows: dict[str, Tensor], states: Tensor, slopes: Tensor, index: Tensor) -> None:
    """q, k, v and out [S, H, D] by name; states [N, H, D, D] fp32, whose slots are dense."""
    q, decay, index = rows["q"], torch.exp(-slopes.float()), index.contiguous()
    given = LightningStep(
        states=states.data_ptr(), decay=decay.data_ptr(), index=index.data_ptr(),
        slot_step=states.stride(0), heads=q.shape[1], size=q.shape[2], is_short=is_short(q),
        **_rows(rows),
    )  # fmt: skip
    call("lightning_step", ctypes.byref(given), len(q))


def attention(
    name: str,
    rows: dict[str, Tensor],
    lse: Tensor | None,
    lengths: Sequence[int],
    window: int | None = None,
) -> None:
    """`attention_fwd` or `attention_bwd`: [T, heads, D] by their names in C, lse [T, H].

    `attention_one` takes q and out [S, H, D] and no lse; the lengths are those of k and v.
    """
    q, starts = rows["q"], _starts(lengths)
    steps = (0, 0) if lse is None else lse.stride()
    given = Attention(
        lse=None if lse is None else lse.data_ptr(), lse_step=steps[0], lse_head_step=steps[1],
        starts=ctypes.addressof(starts), heads=q.shape[1], key_heads=rows["k"].shape[1],
        size=q.shape[2], window=window or len(q), scale=q.shape[2] ** -0.5,
        is_short=is_short(q), **_rows(rows),
    )  # fmt: skip
    call(name, ctypes.byref(given), len(lengths))


def _starts(lengths: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (_INT64 * (len(lengths) + 1))(0, *itertools.accumulate(lengths))


def _rows(rows: dict[str, Tensor]) -> dict[str, Rows]:
    assert all(x.stride(2) == 1 or x.shape[2] == 1 for x in rows.values()), "rows are dense"
    return {key: Rows(x.data_ptr(), *x.stride()[:2]) for key, x in rows.items()}
