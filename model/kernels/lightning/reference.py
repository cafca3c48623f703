"""The definition of lightning attention: one step of the recurrence a token, in fp64 or fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lightning_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: Sequence[int],
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """state_t = exp(-slope) * state_{t-1} + k_t^T v_t, o_t = q_t state_t, per head and sequence.

    Args:
        q, k, v: [T, H, D].
        slopes: [H], >= 0.
        lengths: tokens of each sequence, sum T.
        initial_state: [S, H, D, D]; zero if None.

    Returns: o [T, H, D] and the final states [S, H, D, D], in the dtype of q.

    Source: MiniMax-01 report, section 2.2.1; decay as in the released model code.
    """
    decay = torch.exp(-slopes.to(q.dtype))[:, None, None]
    outputs, finals, start = [], [], 0
    for index, length in enumerate(lengths):
        heads, size = q.shape[1:]
        state = q.new_zeros(heads, size, size) if initial_state is None else initial_state[index]
        for t in range(start, start + length):
            state = decay * state + k[t, :, :, None] * v[t, :, None, :]
            outputs.append(torch.einsum("hd,hde->he", q[t], state))
        finals.append(state)
        start += length
    return torch.stack(outputs), torch.stack(finals)
