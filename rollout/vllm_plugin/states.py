"""What vLLM has to know of a lightning layer: its states, and the rows of each step."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import MambaSpec

from model import HybridConfig

# fp32 whatever the model's dtype: the state sums thousands of terms (PAPER section 2.2)
STATE_DTYPES = (torch.float32,)


def state_shapes(config: HybridConfig, num_ranks: int) -> tuple[tuple[int, int, int]]:
    """[H / ranks, D, D] of one sequence and layer."""
    return ((config.num_attention_heads // num_ranks, config.head_dim, config.head_dim),)


@dataclass
class LightningMetadata(LinearAttentionMetadata):
    """vLLM's own, and each row's number of new tokens on the host: kernels are planned by it."""

    lengths: tuple[int, ...] = ()


class LightningMetadataBuilder(LinearAttentionMetadataBuilder):
    def __init__(
        self,
        kv_cache_spec: MambaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rows = vllm_config.scheduler_config.max_num_seqs
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.slots = torch.zeros(max(rows, captured), dtype=torch.int32, device=device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LightningMetadata:
        known = super().build(common_prefix_len, common_attn_metadata, fast_build)
        values = {field.name: getattr(known, field.name) for field in fields(known)}
        # a captured graph reads the same memory at each replay, and vLLM may hand over another
        slots = self.slots[: len(known.state_indices_tensor)]
        values["state_indices_tensor"] = slots.copy_(known.state_indices_tensor)
        lengths = common_attn_metadata.query_start_loc_cpu.diff().tolist()
        return LightningMetadata(**values, lengths=tuple(lengths))


class LightningBackend(LinearAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "HYBRID_LIGHTNING"

    @staticmethod
    def get_builder_cls() -> type[LightningMetadataBuilder]:
        return LightningMetadataBuilder
