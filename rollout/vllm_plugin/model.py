"""The network in vLLM's form, top to bottom: the blocks of `model.hybrid` on vLLM's caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.sequence import IntermediateTensors

from model import HybridConfig
from model.config_layouts import read_config
from model.kernels.norm.op import join
from model.norm import ResidualNorm, RMSNorm
from model.rotary import rotary_angles
from rollout.vllm_plugin.layers import (
    Angles,
    ExpertsOfRank,
    InPlaceHead,
    LightningAttention,
    SoftmaxAttention,
)
from rollout.vllm_plugin.loading import Loader
from rollout.vllm_plugin.published import PUBLISHED_TYPES
from rollout.vllm_plugin.states import STATE_DTYPES, state_shapes


def hybrid_config(config: PretrainedConfig) -> HybridConfig:
    """Our config of what vLLM read: a checkpoint of this project or of transformers, or Text-01."""
    if isinstance(config, HybridConfig):
        return config
    values = config.to_dict()
    if config.model_type not in PUBLISHED_TYPES:
        return read_config(values, layout="transformers-disk")
    # transformers and vLLM gather the rotary keys under one name of their own
    rope = values.pop("rope_parameters", None) or {}
    values.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    return read_config(values, layout="text-01")


def refuse_unsupported(config: HybridConfig, vllm_config: VllmConfig) -> None:
    """What would be ignored, or computed wrongly.

    Raises:
        ValueError: naming the first of vLLM's settings that this model does not honour.
    """
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    rules: tuple[tuple[str, Any, bool, str], ...] = (
        (
            "quantization",
            vllm_config.model_config.quantization,
            vllm_config.quant_config is None,
            "none",
        ),
        (
            "speculative_config",
            vllm_config.speculative_config,
            vllm_config.speculative_config is None,
            "none: states cannot be rolled back",
        ),
        (
            "enable_expert_parallel",
            parallel.enable_expert_parallel,
            not parallel.enable_expert_parallel,
            "False; tensor_parallel_size cuts every expert",
        ),
        (
            "tensor_parallel_size",
            ranks,
            config.num_attention_heads % ranks == 0 and config.intermediate_size % ranks == 0,
            f"a divisor of num_attention_heads = {config.num_attention_heads} and "
            f"intermediate_size = {config.intermediate_size}",
        ),
    )
    for key, value, good, expected in rules:
        if not good:
            raise ValueError(f"vLLM's {key} = {value}, expected {expected}")


class Block(nn.Module):
    """Attention, then experts, joined by DeepNorm's alpha and beta: `model.hybrid.Block`."""

    def __init__(
        self, config: HybridConfig, layer: int, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.is_lightning = config.layer_types[layer] == "linear_attention"
        kind = LightningAttention if self.is_lightning else SoftmaxAttention
        self.self_attn = kind(config, layer, vllm_config, f"{prefix}.self_attn")
        self.mlp = ExpertsOfRank(config)
        gain = (
            (config.linear_attn_alpha_factor, config.linear_attn_beta_factor)
            if self.is_lightning
            else (config.full_attn_alpha_factor, config.full_attn_beta_factor)
        )
        size, eps, postnorm = config.hidden_size, config.rms_norm_eps, config.postnorm
        self.input_layernorm = ResidualNorm(size, eps, postnorm=postnorm)
        self.post_attention_layernorm = ResidualNorm(size, eps, postnorm=postnorm, gain=gain)
        self.mlp_gain = (config.mlp_alpha_factor, config.mlp_beta_factor)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """[T, C] -> [T, C]."""
        residual, normed = self.input_layernorm(x)
        branch = self.self_attn(normed) if self.is_lightning else self.self_attn(normed, angles)
        residual, normed = self.post_attention_layernorm(residual, branch)
        branch, _ = self.mlp(normed)
        return join(residual, branch, self.mlp_gain)


class Trunk(nn.Module):
    """Embeddings, blocks, last norm."""

    def __init__(self, config: HybridConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.quant_method = InPlaceHead(head_fp32=config.lm_head_fp32)
        self.layers = nn.ModuleList(
            Block(config, layer, vllm_config, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_dim = config.rotary_dim if config.rotary_dim is not None else config.head_dim
        self.rotary_base = float(config.rope_parameters["rope_theta"])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """[T, C], [T] -> [T, C]."""
        angles = rotary_angles(positions, self.rotary_dim, self.rotary_base)
        for layer in self.layers:
            x = layer(x, angles)
        normed: Tensor = self.norm(x)
        return normed


class HybridForVllm(nn.Module, HasInnerState, IsHybrid):
    """What vLLM runs for a checkpoint of this architecture.

    Honours: chunked prefill, prefix caching, tensor parallelism, in-place weight pushes.

    Raises:
        ValueError: if the checkpoint or vLLM's settings ask for what it does not compute.
    """

    # vLLM asks the class before there is a model
    has_inner_state: ClassVar[Literal[True]] = True
    is_hybrid: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = hybrid_config(vllm_config.model_config.hf_config)
        refuse_unsupported(config, vllm_config)
        self.config = config
        self.model = Trunk(config, vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.lm_head.quant_method = InPlaceHead(head_fp32=config.lm_head_fp32)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.requires_grad_(False)
        self.eval()
        self.loader = Loader(
            dict(self.named_parameters()),
            config,
            rank=get_tensor_model_parallel_rank(),
            ranks=get_tensor_model_parallel_world_size(),
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, C]."""
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[T] token ids, or [T, C] embeddings, and [T] positions -> [T, C]."""
        if inputs_embeds is None:
            assert input_ids is not None, "vLLM gives token ids or embeddings"
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden: Tensor = self.model(inputs_embeds, positions)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, C] -> [T, V]; None on ranks that do not sample."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies weights in place, at the start or while the engine runs; see `Loader.load`."""
        return self.loader.load(weights)

    def held_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of this rank by the name it has in `HybridForCausalLM`; views, no copies."""
        return self.loader.held()

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int, int]]:
        config = hybrid_config(vllm_config.model_config.hf_config)
        return state_shapes(config, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return STATE_DTYPES

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a state is copied to another slot: whole, as of any linear attention."""
        return tuple(MambaStateCopyFuncCalculator.linear_attention_state_copy_func())
