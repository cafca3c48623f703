"""The layers in vLLM's form: its projections and paged attention, our kernels between them.

Each is cut over tensor parallel ranks by heads, or by the experts' inner dimension. The kernels are
those that a trainer runs, so that engine and trainer differ by as little as they can. All weights
stay where they were loaded, in one piece: a push copies into them.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from model import HybridConfig
from model.kernels.lightning.op import lightning_attention, lightning_step
from model.kernels.linear.op import linear
from model.kernels.logprob.op import head_logits
from model.kernels.norm.op import gated_norm
from model.kernels.qkv.op import silu_qkv
from model.kernels.rotary.op import rotate
from model.lightning import decay_slopes
from model.moe import MoE
from rollout.vllm_plugin.states import (
    STATE_DTYPES,
    LightningBackend,
    LightningMetadata,
    state_shapes,
)

Angles = tuple[Tensor, Tensor]


class _Weighed(Protocol):
    """A layer of vLLM's that holds one weight."""

    weight: Tensor


class InPlaceLinear(UnquantizedLinearMethod):
    """Multiplies by the weight itself: vLLM on a CPU would pack a copy and free the weight."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the weight is used as it was loaded."""

    def apply(self, layer: _Weighed, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "no projection of this model has a bias"
        return linear(x, layer.weight)


class InPlaceHead(UnquantizedEmbeddingMethod):
    """Embeddings and LM head on the weight itself, the head in fp32 if the config says so."""

    def __init__(self, *, head_fp32: bool) -> None:
        self.head_fp32 = head_fp32

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the weight is used as it was loaded."""

    def apply(self, layer: _Weighed, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "the LM head has no bias"
        return head_logits(x, layer.weight, head_fp32=self.head_fp32)


def in_place(layer: LinearBase) -> LinearBase:
    """The same projection, its weight never packed."""
    layer.quant_method = InPlaceLinear()
    return layer


class SoftmaxAttention(nn.Module):
    """Grouped-query attention on vLLM's pages, a part of each head rotated."""

    def __init__(
        self, config: HybridConfig, layer: int, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        size, heads, groups = (
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim = size
        self.qkv_proj = in_place(
            QKVParallelLinear(
                config.hidden_size, size, heads, groups, bias=False, prefix=f"{prefix}.qkv_proj"
            )
        )
        self.o_proj = in_place(
            RowParallelLinear(
                heads * size, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
            )
        )
        # fewer groups than ranks: each rank holds a whole one, several of them the same
        self.widths = [heads // ranks * size, *([max(groups // ranks, 1) * size] * 2)]
        self.attn = Attention(
            heads // ranks,
            size,
            size**-0.5,
            num_kv_heads=max(groups // ranks, 1),
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=config.window(layer),
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """[T, C] -> [T, C]."""
        q, k, v = self.qkv_proj(x)[0].split(self.widths, dim=-1)
        q, k = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
        q, k = rotate(q, k, *angles)
        out: Tensor = self.o_proj(self.attn(q.flatten(1), k.flatten(1), v))[0]
        return out


class GatedNorm(nn.Module):
    """sigmoid(gate) * RMSNorm over the heads of all ranks."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(size // self.ranks))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """[T, H D / ranks] each -> the same."""
        if self.ranks == 1:
            return gated_norm(x, gate, self.weight, self.eps)
        wide = x.float()
        square = tensor_model_parallel_all_reduce(wide.square().mean(-1, keepdim=True)) / self.ranks
        normed = wide * torch.rsqrt(square + self.eps) * self.weight.float()
        return (gate.float().sigmoid() * normed).to(x.dtype)


class LightningAttention(nn.Module, MambaBase):
    """Lightning attention on fp32 states that vLLM keeps as it keeps Mamba's."""

    # vLLM's pages of this layer, bound before the first step: (states [slots, H / ranks, D, D],)
    kv_cache: tuple[Tensor, ...]

    def __init__(
        self, config: HybridConfig, layer: int, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.config, self.layer, self.prefix = config, layer, prefix
        self.ranks = get_tensor_model_parallel_world_size()
        self.rank = get_tensor_model_parallel_rank()
        self.heads = config.num_attention_heads // self.ranks
        size, width = config.hidden_size, config.num_attention_heads * config.head_dim
        # of each head [q | k | v], so that a cut by columns is a cut by heads
        self.qkv_proj = in_place(
            ColumnParallelLinear(size, 3 * width, bias=False, prefix=f"{prefix}.qkv_proj")
        )
        self.output_gate = in_place(
            ColumnParallelLinear(size, width, bias=False, prefix=f"{prefix}.output_gate")
        )
        self.out_proj = in_place(
            RowParallelLinear(width, size, bias=False, prefix=f"{prefix}.out_proj")
        )
        self.norm = GatedNorm(width, config.lightning_norm_eps)
        # here vLLM finds the layers that hold a cache
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[LightningBackend]:
        return LightningBackend

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        return state_shapes(self.config, self.ranks)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return STATE_DTYPES

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]; rows beyond the step's tokens are padding."""
        q, k, v = silu_qkv(self.qkv_proj(x)[0], self.heads)
        every = decay_slopes(
            self.config.num_attention_heads, self.layer, self.config.num_hidden_layers, q.device
        )
        slopes = every[self.rank * self.heads :][: self.heads]
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            # vLLM measures how much memory a step needs: one sequence, no state
            out = lightning_attention(q, k, v, slopes, (x.shape[0],))[0]
        else:
            assert isinstance(metadata, dict), "one step a forward: micro-batches are not asked for"
            out = torch.zeros_like(v)
            self._attend(q, k, v, slopes, metadata[self.prefix], out)
        gated = self.norm(out.flatten(1), self.output_gate(x)[0])
        projected: Tensor = self.out_proj(gated)[0]
        return projected

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        step: LightningMetadata,
        out: Tensor,
    ) -> None:
        """Fills `out` and takes the states on; single tokens come first, then longer pieces."""
        states = self.kv_cache[0]
        # unused rows of a captured graph point at -1; vLLM keeps slot 0 for nobody
        index = step.state_indices_tensor.long().clamp(min=0)
        singles, total = step.num_decodes, step.num_decode_tokens + step.num_prefill_tokens
        if singles:
            one = slice(0, singles)
            # a prompt of one token: its slot may hold what another request left; no branch, because
            # a captured graph has none
            starts = torch.where(step.seq_lens[one] <= 1, index[one], 0)
            states.index_fill_(0, starts, 0.0)
            out[one] = lightning_step(q[one], k[one], v[one], slopes, states, index[one])
        if step.num_prefills:
            more, lengths = slice(singles, total), step.lengths[singles:]
            slots = index[singles:]
            new = torch.tensor(lengths, device=step.seq_lens.device)
            continues = (step.seq_lens[singles:] > new)[:, None, None, None]
            before = torch.where(continues, states.index_select(0, slots), 0.0)
            out[more], after = lightning_attention(
                q[more], k[more], v[more], slopes, lengths, initial_state=before, with_final=True
            )
            assert after is not None, "asked for by with_final"
            states.index_copy_(0, slots, after)


class ExpertsOfRank(MoE):
    """The experts, each cut over ranks along its inner dimension; the router is whole on all."""

    def __init__(self, config: HybridConfig) -> None:
        self.ranks = get_tensor_model_parallel_world_size()
        part = copy.deepcopy(config)
        part.intermediate_size = config.intermediate_size // self.ranks
        super().__init__(part)

    def forward(
        self, x: Tensor, recorded: Tensor | None = None, in_pieces: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[T, C] -> [T, C] and router logits [T, E]."""
        out, logits = super().forward(x, recorded, in_pieces)
        return (tensor_model_parallel_all_reduce(out) if self.ranks > 1 else out), logits
