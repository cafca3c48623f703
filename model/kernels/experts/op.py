"""The expert layer: tokens sorted by expert, grouped products, a weighted sum.

    y_t = sum_k p_{t,k} W2_e (silu(g) * u),   [g | u] = W1_e x_t,   e = chosen[t, k]

Three forms give the same numbers: torch matmuls, one an expert (`blocks.py`), and on CUDA, where
nothing waits for the device, kernels and grouped products (`launch.py`) or, for few tokens, three
kernels that read each chosen expert's weights once (`experts_few`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.experts.blocks import expert_layer_blocks
from model.kernels.experts.pieces import PIECE_TOKENS, experts_in_pieces

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expert_layer(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    weights: Tensor,
    *,
    in_pieces: bool = False,
) -> Tensor:
    """Weighted sum of each token's experts (SwiGLU).

    Args:
        x: [T, C]; gate_up: [E, 2F, C], gate first; down: [E, C, F]; of one dtype, any under
            autocast.
        chosen: [T, K] int64 in 0..E, E where the place is dropped.
        weights: [T, K] in any float dtype; those of dropped places get no gradient.
        in_pieces: keep the inputs alone for backward, and compute some tokens at a time, so that
            the memory in use does not grow with T (`pieces.py`); so are long rows without gradient.

    Returns: [T, C] in the dtype of x; on CUDA the same from run to run, gradients too.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.

    Example:
        >>> x = torch.ones(1, 2)
        >>> expert_layer(x, torch.ones(1, 2, 2), torch.ones(1, 2, 1),
        ...              torch.tensor([[0]]), torch.ones(1, 1)).shape
        torch.Size([1, 2])
    """
    _check(x, gate_up, down, chosen, weights)
    if in_pieces or (len(x) > PIECE_TOKENS and not torch.is_grad_enabled()):
        return experts_in_pieces(expert_layer, x, gate_up, down, chosen, weights)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(low), gate_up.to(low), down.to(low)
    if not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"x {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}: expected one dtype"
        )
    if x.is_cuda and x.dtype in TRITON_DTYPES and chosen.numel():
        # not at the top: torch for CPU comes without triton
        from model.kernels.experts.launch import expert_layer_triton
        from model.kernels.experts_few.launch import MAX_PLACES, expert_layer_few

        is_dense = gate_up.is_contiguous() and down.is_contiguous()
        if chosen.numel() <= MAX_PLACES and is_dense and not torch.is_grad_enabled():
            return expert_layer_few(x, gate_up, down, chosen, weights).to(dtype)

        return expert_layer_triton(x, gate_up, down, chosen, weights).to(dtype)
    return expert_layer_blocks(x, gate_up, down, chosen, weights).to(dtype)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor) -> None:
    fits = x.ndim == 2 and gate_up.ndim == 3 and gate_up.shape[1] % 2 == 0
    if fits:
        num_experts, twice, size = gate_up.shape
        fits = x.shape[1] == size and down.shape == (num_experts, size, twice // 2)
    if not fits:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}: "
            "expected [T, C], [E, 2F, C], [E, C, F]"
        )
    if chosen.ndim != 2 or len(chosen) != len(x) or weights.shape != chosen.shape:
        raise ValueError(
            f"chosen {tuple(chosen.shape)}, weights {tuple(weights.shape)}: expected both [T, K] "
            f"with T = {len(x)}"
        )
    if chosen.dtype != torch.int64 or not weights.is_floating_point():
        raise ValueError(
            f"chosen {chosen.dtype}, weights {weights.dtype}: expected torch.int64 and a float"
        )
    if not x.device == gate_up.device == down.device == chosen.device == weights.device:
        raise ValueError(
            f"x on {x.device}, gate_up on {gate_up.device}, down on {down.device}, chosen on "
            f"{chosen.device}, weights on {weights.device}: expected one device"
        )
