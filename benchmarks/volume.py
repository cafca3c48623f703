"""What ranks must send and hold, from a model's shape alone: no device is asked.

Bytes are those that one rank receives in one training step (it sends as many). A checkpointed
layer runs forward twice, so what its forward sends is counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.config import HybridConfig, count_parameters

STATE_BYTES = 4
LOW_BYTES = 2


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank receives in a step, by purpose."""

    states: int = 0
    heads: int = 0
    experts: int = 0
    logprobs: int = 0
    gradients: int = 0
    weights: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def kinds(config: HybridConfig) -> tuple[int, int]:
    """Lightning layers and softmax layers."""
    lightning = config.layer_types.count("linear_attention")
    return lightning, len(config.layer_types) - lightning


def sequence_volume(
    config: HybridConfig, tokens: int, ranks: int, *, forwards: int = 2, reduced: int = 0
) -> Volume:
    """Of a row of `tokens` that `ranks` share.

    Args:
        forwards: times that a layer runs forward in a step.
        reduced: parameters whose gradients are summed over the ranks, two bytes each.
    """
    lightning, softmax = kinds(config)
    heads, kv, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    others = ranks - 1
    state = heads * size * size * STATE_BYTES
    # q, k, v there and out back; the keys of a head go to each rank that needs them
    moved = (2 * heads + 2 * max(kv, ranks)) * size * LOW_BYTES * tokens // ranks
    return Volume(
        states=lightning * (forwards + 1) * others * state,
        heads=softmax * (forwards + 1) * moved * others // ranks,
        logprobs=2 * 4 * tokens * others // ranks,
        gradients=2 * others * reduced * LOW_BYTES // ranks,
    )


def expert_volume(config: HybridConfig, tokens: int, ranks: int, *, dispatches: int = 1) -> Volume:
    """Of rows of `tokens` a rank whose experts `ranks` share, if the router is even.

    Args:
        dispatches: times that tokens travel to their experts in forward (twice if computed again).
    """
    rows = tokens * config.num_experts_per_tok * (ranks - 1) // ranks
    once = rows * config.hidden_size * LOW_BYTES
    # there and back in forward, there and back in backward
    return Volume(experts=len(config.layer_types) * once * (dispatches + 3))


class Memory(NamedTuple):
    """Bytes on one rank."""

    state: int
    kept: int
    layer: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Layout:
    """How a step of a large model lies on its ranks.

    Args:
        ranks: all of them; sequence: those that share a row; expert: those that share the experts.
        tokens: of a row.
        lora_rank: 0 trains every weight.
    """

    ranks: int
    sequence: int
    expert: int
    tokens: int
    lora_rank: int = 0


def memory(config: HybridConfig, layout: Layout) -> Memory:
    """What a rank holds: its shard of all states, block inputs, and the layer at work.

    Weights are bf16 and spread over all ranks (FSDP), those of the experts too; full training adds
    bf16 gradients and 12 bytes of fp32 master weight and moments.
    """
    size, layers = config.hidden_size, len(config.layer_types)
    total = count_parameters(config).total
    bytes_each = LOW_BYTES if layout.lora_rank else 2 * LOW_BYTES + 12
    own = layout.tokens // layout.sequence
    width = config.num_attention_heads * config.head_dim
    # x, norm, projections (3 + 1 widths), q k v, o, gated, branch, norm; gradients of half of them
    layer = own * LOW_BYTES * (5 * size + 9 * width) * 3 // 2
    experts = config.num_local_experts * 3 * size * config.intermediate_size
    shared = (total - layers * experts) // layers
    # the layer at work is gathered whole, its experts over the ranks that hold the same ones
    layer += LOW_BYTES * (shared + experts // layout.expert)
    return Memory(total * bytes_each // layout.ranks, layers * own * size * LOW_BYTES, layer)


def volume(config: HybridConfig, layout: Layout) -> Volume:
    """What a rank receives in one step of one row per `sequence` ranks."""
    parameters = count_parameters(config)
    layers = len(config.layer_types)
    experts = layers * config.num_local_experts * 3 * config.hidden_size * config.intermediate_size
    gathered = parameters.total - experts + experts // layout.expert
    ranks = layout.ranks
    row = sequence_volume(config, layout.tokens, layout.sequence)
    own = layout.tokens // layout.sequence
    routed = expert_volume(config, own, layout.expert, dispatches=2)
    trained = 0 if layout.lora_rank else gathered
    return Volume(
        states=row.states,
        heads=row.heads,
        logprobs=row.logprobs,
        experts=routed.experts,
        weights=2 * gathered * LOW_BYTES * (ranks - 1) // ranks,
        gradients=trained * LOW_BYTES * (ranks - 1) // ranks,
    )
