"""The lightning layer: SiLU on a per-head interleaved qkv, decayed linear attention, norm, gate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.config import HybridConfig
from model.kernels.lightning.op import lightning_attention, lightning_piece, lightning_step
from model.kernels.linear.op import Linear
from model.kernels.qkv.op import silu_qkv
from model.norm import GatedRMSNorm
from model.packed import Packed
from model.step import DecodeStep, PieceStep, Step

Attended = tuple[Tensor, Tensor | None]
Begin = Callable[..., Callable[[], Attended]]


@functools.lru_cache(maxsize=1024)
def decay_slopes(
    heads: int,
    layer: int,
    num_layers: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[H], fp32 or fp64: slope of head h = 1..H is 2^(-8h/H) * (1 - l/(L-1) + 1e-5).

    Derived when asked for and never part of a module, so that no cast of the model to bf16 and no
    checkpoint can change it.

    Example:
        >>> decay_slopes(8, 0, 80, torch.device("cpu"))[:2]
        tensor([0.5000, 0.2500])
    """
    # a tensor first made in inference mode could never be saved for a later backward
    with torch.inference_mode(False):
        head = torch.arange(1, heads + 1, dtype=torch.float64)
        factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
        return (2.0 ** (-8 * head / heads) * factor).to(device=device, dtype=dtype)


def begin_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: Sequence[int],
    *,
    initial_state: Tensor | None = None,
    with_final: bool = False,
) -> Callable[[], Attended]:
    """`lightning_attention`, whose result is asked for by a second call.

    One process has it at once. Where ranks share a row, what they send to each other travels until
    the second call.
    """
    found = lightning_attention(
        q, k, v, slopes, lengths, initial_state=initial_state, with_final=with_final
    )
    return lambda: found


class LightningAttention(nn.Module):
    """One lightning attention layer over packed tokens.

    Honours: packing (the state restarts at each sequence), cache.

    Source: MiniMax-01 report, section 2.2; layout of qkv as in the released code: per head
    [q | k | v], split after the view.
    """

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        width = self.heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, 3 * width)
        self.out_proj = Linear(width, config.hidden_size)
        self.output_gate = Linear(config.hidden_size, width)
        self.norm = GatedRMSNorm(width, config.lightning_norm_eps)
        self.begin: Begin = begin_attention

    def forward(self, x: Tensor, packed: Packed, cache: Step | None = None) -> Tensor:
        """[T, C] -> [T, C]."""
        q, k, v = silu_qkv(self.qkv_proj(x), self.heads)
        wide = torch.promote_types(q.dtype, torch.float32)
        slopes = decay_slopes(self.heads, self.layer, self.num_layers, q.device, wide)
        if isinstance(cache, DecodeStep):
            states = cache.states[cache.lightning[self.layer]]
            if isinstance(cache, PieceStep):
                out = lightning_piece(q, k, v, slopes, states, cache.rows)
            else:
                out = lightning_step(q, k, v, slopes, states, cache.index)
            return self.out_proj(self.norm(out.flatten(1), self.output_gate(x)))
        state = None if cache is None else cache.state(self.layer)
        attended = self.begin(
            q, k, v, slopes, packed.lengths, initial_state=state, with_final=cache is not None
        )
        # between the two calls: needs nothing of other ranks
        gate = self.output_gate(x)
        out, final = attended()
        if cache is not None:
            assert final is not None, "asked for by with_final"
            cache.put_state(self.layer, final)
        return self.out_proj(self.norm(out.flatten(1), gate))
