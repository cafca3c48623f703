"""Names of tensors in every layout a checkpoint comes in, both directions.

    native             in memory: experts fused, `mlp.experts.gate_up_proj` [E, 2F, C]
    transformers-disk  an ordinary `minimax` folder: one tensor per expert and matrix
    text-01            the published MiniMax-Text-01 and M1: the same tensors, other config keys
    vllm               what vLLM's own MiniMax loader (up to 0.23) opens

One table holds the tensors (`TENSORS`), and `model/config_layouts.py` one of the config keys;
reading and writing are the same table in two directions. Decay buffers are derived from the config:
they are dropped on reading and never written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import HybridConfig
from model.config_layouts import Layout, check_layout, refuse_foreign

Layers = Literal["none", "all", "lightning", "softmax"]

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# transformers writes these buffers into checkpoints; each engine derives its own.
DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@dataclass(frozen=True)
class Row:
    """One tensor of the model in memory, and the public tensors it is made of.

    Args:
        layers: which layers hold it; `none` stands once in the model.
        native: name in memory, with {layer}.
        public: names on disk, with {layer} and {expert}. Several stand one after the other along
            the output dimension, and those with {expert} are stacked over the experts.
    """

    layers: Layers
    native: str
    public: tuple[str, ...]

    @property
    def is_fused(self) -> bool:
        return "{expert}" in self.public[0]


_LAYER = "model.layers.{layer}."
_MOE = _LAYER + "block_sparse_moe."


def _same(layers: Layers, name: str) -> Row:
    return Row(layers, _LAYER + name, (_LAYER + name,))


TENSORS: tuple[Row, ...] = (
    Row("none", EMBEDDINGS, (EMBEDDINGS,)),
    Row("none", "model.norm.weight", ("model.norm.weight",)),
    Row("none", HEAD, (HEAD,)),
    _same("all", "input_layernorm.weight"),
    _same("all", "post_attention_layernorm.weight"),
    _same("lightning", "self_attn.qkv_proj.weight"),
    _same("lightning", "self_attn.out_proj.weight"),
    _same("lightning", "self_attn.output_gate.weight"),
    _same("lightning", "self_attn.norm.weight"),
    _same("softmax", "self_attn.q_proj.weight"),
    _same("softmax", "self_attn.k_proj.weight"),
    _same("softmax", "self_attn.v_proj.weight"),
    _same("softmax", "self_attn.o_proj.weight"),
    Row("all", _LAYER + "mlp.gate.weight", (_MOE + "gate.weight",)),
    Row(
        "all",
        _LAYER + "mlp.experts.gate_up_proj",
        (_MOE + "experts.{expert}.w1.weight", _MOE + "experts.{expert}.w3.weight"),
    ),
    Row("all", _LAYER + "mlp.experts.down_proj", (_MOE + "experts.{expert}.w2.weight",)),
)


@dataclass(frozen=True)
class _Place:
    """Where a native tensor's parts lie: names[expert][part]; one plain name if not fused."""

    names: tuple[tuple[str, ...], ...]
    is_fused: bool


def tensor_names(config: HybridConfig, layout: Layout) -> tuple[str, ...]:
    """Every tensor name of a model in a layout, in the model's order.

    Raises:
        ValueError: if the layout is unknown.

    Example:
        >>> config = HybridConfig(num_hidden_layers=1, num_local_experts=2)
        >>> tensor_names(config, "vllm")[-2:]
        ('model.layers.0.block_sparse_moe.experts.0.w2.weight', \
'model.layers.0.block_sparse_moe.experts.1.w2.weight')
    """
    check_layout(layout)
    plan = _plan(config, tied_head=layout == "vllm")
    if layout == "native":
        return tuple(plan)
    return tuple(name for place in plan.values() for names in place.names for name in names)


def tensor_shapes(config: HybridConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model in a layout, in the model's order; nothing is allocated.

    Raises:
        ValueError: if the layout is unknown.

    Example:
        >>> config = HybridConfig(num_hidden_layers=1, num_local_experts=2)
        >>> tensor_shapes(config, "vllm")["model.layers.0.block_sparse_moe.gate.weight"]
        (2, 4096)
    """
    size, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    matrices = {
        "embed_tokens": (config.vocab_size, size),
        "lm_head": (config.vocab_size, size),
        "qkv_proj": (3 * width, size),
        "output_gate": (width, size),
        "out_proj": (size, width),
        "q_proj": (width, size),
        "k_proj": (kv_width, size),
        "v_proj": (kv_width, size),
        "o_proj": (size, width),
        "gate": (experts, size),
        "w1": (inner, size),
        "w2": (size, inner),
        "w3": (inner, size),
        "gate_up_proj": (experts, 2 * inner, size),
        "down_proj": (experts, size, inner),
    }

    def shape(name: str) -> tuple[int, ...]:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        norm = (width if name.endswith("self_attn.norm.weight") else size,)
        return matrices.get(kind, norm)

    return {name: shape(name) for name in tensor_names(config, layout)}


@dataclass(frozen=True)
class Spot:
    """Where one tensor of a layout lies in the model in memory.

    Args:
        native: name in memory.
        expert: index into the first dimension of a fused tensor; None where it has none.
        part, num_parts: which of equal parts of the output dimension it is.
    """

    native: str
    expert: int | None = None
    part: int = 0
    num_parts: int = 1


def tensor_spots(config: HybridConfig, layout: Layout) -> dict[str, Spot]:
    """Name in the layout -> where that tensor lies in the model in memory.

    Raises:
        ValueError: if the layout is unknown.

    Example:
        >>> config = HybridConfig(num_hidden_layers=1, num_local_experts=2)
        >>> name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
        >>> tensor_spots(config, "text-01")[name]
        Spot(native='model.layers.0.mlp.experts.gate_up_proj', expert=1, part=1, num_parts=2)
    """
    check_layout(layout)
    plan = _plan(config, tied_head=False)
    if layout == "native":
        return {name: Spot(name) for name in plan}
    return {
        name: Spot(native, expert if place.is_fused else None, part, len(names))
        for native, place in plan.items()
        for expert, names in enumerate(place.names)
        for part, name in enumerate(names)
    }


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, config: HybridConfig, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The same weights under the names of another layout.

    Args:
        tensors: (name, tensor) of the model in memory, each once, in any order; decay buffers
            are left out. With tied embeddings `lm_head.weight` may be there or not.
    Returns: (name, tensor) of the layout; experts are views of the fused tensor.

    Raises:
        ValueError: if the layout is unknown or cannot hold this model, or if a tensor is unknown,
            twice or missing.
    """
    check_layout(layout)
    refuse_foreign(config, layout)
    plan = _plan(config, tied_head=False)
    for name, tensor in _known(tensors, plan, config):
        place = plan[name]
        if layout == "native":
            yield name, tensor
        elif not place.is_fused:
            yield place.names[0][0], tensor
        else:
            for names, expert in zip(place.names, tensor, strict=True):
                yield from zip(names, expert.chunk(len(names)), strict=True)
        if name == EMBEDDINGS and config.tie_word_embeddings and layout == "vllm":
            yield HEAD, tensor


def public_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, config: HybridConfig, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The weights of one public layout as those of another: all of them share their names.

    Args:
        tensors: (name, tensor), each once, in any order; decay buffers are left out.

    Raises:
        ValueError: as `write_tensors`.
    """
    check_layout(layout)
    refuse_foreign(config, layout)
    plan = _plan(config, tied_head=False)
    names = {part for place in plan.values() for parts in place.names for part in parts}
    for name, tensor in _known(tensors, dict.fromkeys(names), config):
        yield name, tensor
        if name == EMBEDDINGS and config.tie_word_embeddings and layout == "vllm":
            # a file holds no memory twice
            yield HEAD, tensor.clone()


def read_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: HybridConfig,
    layout: Layout,
    layer: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint under the names of the model in memory.

    A fused tensor comes out as soon as its last part was read, so that one layer's experts at a
    time are held twice.

    Args:
        tensors: (name, tensor) of the layout, each once, in any order, over all shards.
        config: as `read_config` gives it.
        layer: only this layer's tensors are given; None reads the whole model.

    Raises:
        ValueError: if the layout is unknown, or if a tensor is unknown, twice or missing.
    """
    check_layout(layout)
    refuse_foreign(config, layout)
    plan = _plan(config, tied_head=False)
    if layer is not None:
        prefix = _LAYER.format(layer=layer)
        plan = {name: place for name, place in plan.items() if name.startswith(prefix)}
    if layout == "native":
        yield from _known(tensors, plan, config)
        return
    owner = {part: name for name, place in plan.items() for ps in place.names for part in ps}
    waiting: dict[str, dict[str, Tensor]] = {}
    for part, tensor in _known(tensors, owner, config):
        name = owner[part]
        place, parts = plan[name], waiting.setdefault(name, {})
        parts[part] = tensor
        if len(parts) < sum(len(names) for names in place.names):
            continue
        del waiting[name]
        if place.is_fused:
            yield name, torch.stack([torch.cat([parts[p] for p in ps]) for ps in place.names])
        else:
            yield name, tensor


def _plan(config: HybridConfig, *, tied_head: bool) -> dict[str, _Place]:
    """native name -> its public names, for every tensor of the model."""
    plan: dict[str, _Place] = {}
    experts = range(config.num_local_experts)

    def add(row: Row, layer: int) -> None:
        names = tuple(
            tuple(name.format(layer=layer, expert=expert) for name in row.public)
            for expert in (experts if row.is_fused else (0,))
        )
        plan[row.native.format(layer=layer)] = _Place(names, row.is_fused)

    for row in TENSORS:
        if row.layers == "none" and not (
            row.native == HEAD and config.tie_word_embeddings and not tied_head
        ):
            add(row, 0)
    for layer, kind in enumerate(config.layer_types):
        here = ("all", "lightning" if kind == "linear_attention" else "softmax")
        for row in TENSORS:
            if row.layers in here:
                add(row, layer)
    return plan


def _known(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, object], config: HybridConfig
) -> Iterator[tuple[str, Tensor]]:
    """The stream without derived buffers and without the second name of a tied matrix."""
    missing, tied = dict.fromkeys(expected), {}
    for name, tensor in tensors:
        if name.endswith(DERIVED):
            continue
        if config.tie_word_embeddings and name in (EMBEDDINGS, HEAD):
            tied[name] = tensor
            if len(tied) == 2 and not torch.equal(tied[EMBEDDINGS], tied[HEAD]):
                raise ValueError(
                    f"{HEAD} differs from {EMBEDDINGS} though config.json: tie_word_embeddings = "
                    "true; set it to false"
                )
            if name == HEAD:
                continue
        if name not in expected:
            raise ValueError(
                f"tensor {name} is not part of this model; check the layout and config.json"
            )
        if name not in missing:
            raise ValueError(f"tensor {name} came twice; give each tensor once")
        del missing[name]
        yield name, tensor
    if missing:
        few = ", ".join(list(missing)[:3])
        raise ValueError(f"{len(missing)} tensors are missing: {few}; give every shard")
