"""The softmax layer: grouped key/value heads, partly rotated, causal inside each sequence."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from model.config import HybridConfig
from model.kernels.attention.op import cached_attention, continued_attention, packed_attention
from model.kernels.linear.op import Linear
from model.kernels.paged.op import paged_attention
from model.kernels.rotary.op import rotate
from model.packed import Packed
from model.step import DecodeStep, Step

Core = Callable[..., Tensor]


class SoftmaxAttention(nn.Module):
    """One softmax attention layer over packed tokens, with or without a sliding window.

    Honours: packing, cache, window.
    """

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(width, config.hidden_size)
        self.core: Core = packed_attention

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        angles: tuple[Tensor, Tensor],
        cache: Step | None = None,
    ) -> Tensor:
        """[T, C] -> [T, C]; angles from `rotary_angles` of the packed positions."""
        q, k, v = (
            projection(x).view(x.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, k, *angles)
        if cache is not None:
            cache.write(self.layer, k, v)
        if isinstance(cache, DecodeStep):
            pages = cache.pages[cache.softmax[self.layer]]
            out = paged_attention(
                q, pages, cache.table, cache.index, cache.lengths, window=self.window
            )
        elif cache is None or cache.is_fresh:
            out = self.core(q, k, v, packed.lengths, window=self.window)
        elif self.window is None and max(cache.lengths) > 1:
            past = cache.read_past(self.layer)
            out = continued_attention(q, k, v, past, cache.lengths, cache.held)
        else:
            keys, values = cache.read(self.layer)
            out = cached_attention(q, keys, values, packed.lengths, cache.past, window=self.window)
        return self.o_proj(out.flatten(1))
