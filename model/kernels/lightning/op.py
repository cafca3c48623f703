"""Lightning attention over packed sequences: the entries, which choose the form.

Three forms give the same numbers: torch matmuls on any device (`blocks.py`), C on a CPU where it
was built (`rows.py`) and Triton on CUDA (`launch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from model.kernels.cpu import passes
from model.kernels.lightning.blocks import lightning_blocks
from model.kernels.lightning.plan import FirstRows
from model.kernels.lightning.rows import lightning_rows, lightning_step_rows

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_SIZE = 256

Form = Literal["auto", "torch"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: Sequence[int],
    *,
    initial_state: Tensor | None = None,
    with_final: bool = False,
    form: Form = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with one fixed decay per head.

    Args:
        q, k, v: [T, H, D] of one dtype, bf16, fp16, fp32 or fp64, no scaling applied here; views
            with any strides are read in place as long as D is dense.
        slopes: [H] fp32 (fp64 for q in fp64), >= 0; one step multiplies the state by exp(-slope).
        lengths: tokens of each of the S sequences, >= 1, sum T; the state is zero at each start
            unless an initial state is given.
        initial_state: [S, H, D, D] fp32.
        with_final: whether the final states are wanted.
        form: `auto` takes Triton on CUDA and C on a CPU, and torch for fp64 and for D > 256.

    Returns: o [T, H, D] in the dtype of v, accumulated in fp32; final states [S, H, D, D] fp32
        or None.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit or the lengths do not sum to T.

    Source: MiniMax-01 report, section 2.2.1 (block form); the decay of the released model code.

    Example:
        >>> q = k = v = torch.ones(3, 1, 2)
        >>> lightning_attention(q, k, v, torch.zeros(1), [3])[0][:, 0, 0].tolist()
        [2.0, 4.0, 6.0]
    """
    _check(q, k, v, slopes)
    total, heads, size = q.shape
    if sum(lengths) != total or min(lengths, default=1) < 1:
        raise ValueError(f"lengths {tuple(lengths)} must be >= 1 each and sum to T = {total}")
    expected = (len(lengths), heads, size, size)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state {tuple(initial_state.shape)}, expected {expected}")
    if initial_state is not None and initial_state.device != q.device:
        raise ValueError(f"initial_state is on {initial_state.device}, q on {q.device}")
    if max(lengths, default=0) == 1 and initial_state is not None:
        return _step(q, k, v, slopes, initial_state)
    if form == "auto" and _runs_triton(q) and total:
        # not at the top: torch for CPU comes without triton
        from model.kernels.lightning.launch import lightning_triton

        return lightning_triton(
            q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
        )
    if form == "auto" and passes.takes(q) and size <= passes.MAX_SIZE:
        return lightning_rows(
            q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
        )
    return lightning_blocks(
        q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
    )


def lightning_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    states: Tensor,
    index: Tensor,
    *,
    form: Form = "auto",
) -> Tensor:
    """One token of each of S sequences, their states read and written in place; no gradient.

    Args:
        q, k, v: [S, H, D] of one dtype.
        slopes: [H] fp32 (fp64 for q in fp64), >= 0.
        states: [N, H, D, D] fp32, dense in all but the first dim; slot index[s] is replaced by
            exp(-slope) state + k_s^T v_s.
        index: [S] int64, no slot twice.
        form: as above.

    Returns: [S, H, D] in the dtype of v, q_s times the new state.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit; on a CPU, if a slot is none of the N.

    Example:
        >>> q = k = v = torch.ones(1, 1, 2)
        >>> states = torch.zeros(3, 1, 2, 2)
        >>> lightning_step(q, k, v, torch.zeros(1), states, torch.tensor([2]))
        tensor([[[2., 2.]]])
        >>> states[:, 0, 0, 0].tolist()
        [0.0, 0.0, 1.0]
    """
    _check(q, k, v, slopes)
    _check_slots(q, states, index, len(q))
    with torch.no_grad():
        if form == "auto" and _runs_triton(q) and _is_in_place(states):
            from model.kernels.lightning.launch import lightning_step_triton

            return lightning_step_triton(q, k, v, slopes, states, index)
        is_small = q.shape[2] <= passes.MAX_SIZE
        if form == "auto" and _is_in_place(states) and passes.takes(q) and is_small:
            _check_index(index, len(states))
            return lightning_step_rows(q, k, v, slopes, states, index)
        out, new = _step(q, k, v, slopes, states.index_select(0, index))
        states.index_copy_(0, index, new)
        return out


def lightning_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    states: Tensor,
    rows: FirstRows,
    *,
    form: Form = "auto",
) -> Tensor:
    """New tokens of one sequence, its state read and written in place; no gradient.

    On CUDA nothing waits for the device and shapes depend on T alone, so that a graph can hold it.

    Args:
        q, k, v: [T, H, D] of one dtype, finite; the first `rows.count` rows are the tokens.
        slopes, states: as in `lightning_step`.
        rows: whose tokens, and how many of the T.
        form: as above.

    Returns: [T, H, D] in the dtype of v, zero behind the tokens.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.

    Example:
        >>> q = k = v = torch.ones(4, 1, 2)
        >>> states = torch.zeros(3, 1, 2, 2)
        >>> rows = FirstRows(torch.tensor([2]), torch.tensor([3]))
        >>> lightning_piece(q, k, v, torch.zeros(1), states, rows)[:, 0, 0].tolist()
        [2.0, 4.0, 6.0, 0.0]
        >>> states[:, 0, 0, 0].tolist()
        [0.0, 0.0, 3.0]
    """
    _check(q, k, v, slopes)
    _check_slots(q, states, rows.slot, 1)
    with torch.no_grad():
        if form == "auto" and _runs_triton(q) and _is_in_place(states):
            from model.kernels.lightning.launch import lightning_piece_triton

            return lightning_piece_triton(q, k, v, slopes, states, rows)
        count = int(rows.count)
        out = torch.zeros(q.shape, dtype=v.dtype, device=v.device)
        out[:count], new = lightning_attention(
            q[:count], k[:count], v[:count], slopes, (count,),
            initial_state=states.index_select(0, rows.slot), with_final=True,
        )  # fmt: skip
        assert new is not None, "asked for by with_final"
        states.index_copy_(0, rows.slot, new)
        return out


def _check_slots(q: Tensor, states: Tensor, index: Tensor, count: int) -> None:
    heads, size = q.shape[1:]
    if states.shape[1:] != (heads, size, size) or index.shape != (count,):
        raise ValueError(
            f"states {tuple(states.shape)} and index {tuple(index.shape)}: expected "
            f"[N, {heads}, {size}, {size}] and [{count}]"
        )
    if states.device != q.device or index.device != q.device:
        raise ValueError(f"states on {states.device}, index on {index.device}, q on {q.device}")


def _is_in_place(states: Tensor) -> bool:
    """Whether kernels write these states where they lie."""
    return states.dtype == torch.float32 and states[0].is_contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> None:
    if k.shape != q.shape or v.shape != q.shape or slopes.shape != q.shape[1:2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, slopes "
            f"{tuple(slopes.shape)}: expected q, k, v alike [T, H, D] and slopes [H]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
    if not q.device == k.device == v.device == slopes.device:
        raise ValueError(
            f"q on {q.device}, k on {k.device}, v on {v.device}, slopes on {slopes.device}: "
            "expected one device"
        )


def _check_index(index: Tensor, slots: int) -> None:
    """C would write wherever it is told to."""
    if index.dtype != torch.int64:
        raise ValueError(f"index {index.dtype}, expected torch.int64")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < slots:
        raise ValueError(
            f"index {int(index.min())} to {int(index.max())}: expected slots 0 to {slots - 1}"
        )


def _runs_triton(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in TRITON_DTYPES and q.shape[2] <= MAX_TRITON_SIZE


def _step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token a sequence: the recurrence itself."""
    wide = state.dtype
    state = torch.exp(-slopes.to(wide))[:, None, None] * state
    state = state + k.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    # not a batched product, whose bits depend on the batch
    return (q.to(wide)[..., :, None] * state).sum(-2).to(v.dtype), state
