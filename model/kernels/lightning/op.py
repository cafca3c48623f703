"""Lightning attention over packed sequences: the one entry, which chooses the form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.lightning.blocks import lightning_blocks


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: Sequence[int],
    *,
    initial_state: Tensor | None = None,
    with_final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with one fixed decay per head.

    Args:
        q, k, v: [T, H, D], bf16, fp32 or fp64, no scaling applied here.
        slopes: [H] fp32, >= 0; one step multiplies the state by exp(-slope).
        lengths: tokens of each of the S sequences, >= 1, sum T; the state is zero at each start
            unless an initial state is given.
        initial_state: [S, H, D, D] fp32.
        with_final: whether the final states are wanted.

    Returns: o [T, H, D] in the dtype of v, accumulated in fp32; final states [S, H, D, D] fp32
        or None.

    Raises:
        ValueError: if shapes do not fit or the lengths do not sum to T.

    Source: MiniMax-01 report, section 2.2.1 (block form); the decay of the released model code.

    Example:
        >>> q = k = v = torch.ones(3, 1, 2)
        >>> lightning_attention(q, k, v, torch.zeros(1), [3])[0][:, 0, 0].tolist()
        [2.0, 4.0, 6.0]
    """
    total, heads, size = q.shape
    if k.shape != q.shape or v.shape != q.shape or slopes.shape != (heads,):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, slopes "
            f"{tuple(slopes.shape)}: expected q, k, v alike [T, H, D] and slopes [H]"
        )
    if sum(lengths) != total or min(lengths, default=1) < 1:
        raise ValueError(f"lengths {tuple(lengths)} must be >= 1 each and sum to T = {total}")
    expected = (len(lengths), heads, size, size)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state {tuple(initial_state.shape)}, expected {expected}")
    if max(lengths, default=0) == 1 and initial_state is not None:
        return _step(q, k, v, slopes, initial_state)
    return lightning_blocks(
        q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
    )


def _step(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One token a sequence: the recurrence itself."""
    wide = state.dtype
    state = torch.exp(-slopes.to(wide))[:, None, None] * state
    state = state + k.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    return (q.to(wide)[..., None, :] @ state).squeeze(-2).to(v.dtype), state
