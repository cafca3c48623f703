"""Names of tensors and config keys in every layout a checkpoint comes in, both directions.

    native             in memory: experts fused, `mlp.experts.gate_up_proj` [E, 2F, C]
    transformers-disk  an ordinary `minimax` folder: one tensor per expert and matrix
    text-01            the published MiniMax-Text-01 and M1: the same tensors, other config keys
    vllm               what vLLM's own MiniMax loader (up to 0.23) opens

One table holds the tensors (`TENSORS`), one the config keys (`TEXT_01_KEYS`); reading and writing
are the same table in two directions. Decay buffers are derived from the config: they are dropped
on reading and never written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from model.config import HybridConfig

Layout = Literal["native", "transformers-disk", "text-01", "vllm"]
Layers = Literal["none", "all", "lightning", "softmax"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

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

# our key -> key of Text-01 and M1; every other key has one name everywhere
TEXT_01_KEYS: dict[str, str] = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
TEXT_01_KINDS: dict[str, int] = {"linear_attention": 0, "full_attention": 1}
# two spellings of the list of layer kinds
_KIND_LISTS = ("attn_type_list", "decoder_attention_types")
# keys of the published config that we do not have -> the only values that mean what we compute
_TEXT_01_FIXED: dict[str, tuple[Any, ...]] = {
    "shared_intermediate_size": (0, None),
    "rope_scaling": (None,),
}
# keys that say nothing of the numbers, only of the published code
_TEXT_01_FOREIGN = ("auto_map", "shared_moe_mode", "model_type", "architectures")


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
    _check(layout)
    plan = _plan(config, tied_head=layout == "vllm")
    if layout == "native":
        return tuple(plan)
    return tuple(name for place in plan.values() for names in place.names for name in names)


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
    _check(layout)
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
    _check(layout)
    _refuse(config, layout)
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


def read_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, config: HybridConfig, layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint under the names of the model in memory.

    A fused tensor comes out as soon as its last part was read, so that one layer's experts at a
    time are held twice.

    Args:
        tensors: (name, tensor) of the layout, each once, in any order, over all shards.
        config: as `read_config` gives it.

    Raises:
        ValueError: if the layout is unknown, or if a tensor is unknown, twice or missing.
    """
    _check(layout)
    _refuse(config, layout)
    plan = _plan(config, tied_head=False)
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


def read_config(values: Mapping[str, Any], *, layout: Layout) -> HybridConfig:
    """The config.json of a layout as our config.

    Args:
        values: parsed config.json.

    Raises:
        ValueError: if the layout is unknown, or if a key asks for what this model does not
            compute (a shared expert, scaled rotary positions).

    Example:
        >>> keys = {"num_hidden_layers": 2, "attn_type_list": [0, 1], "rope_theta": 1e7}
        >>> read_config(keys, layout="text-01").layer_types
        ['linear_attention', 'full_attention']
    """
    _check(layout)
    if layout != "text-01":
        known = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
        if layout == "vllm":
            known = {k: v for k, v in known.items() if k not in _vllm_aliases(values)}
        return HybridConfig(**known)
    for key, allowed in _TEXT_01_FIXED.items():
        if values.get(key) not in allowed:
            raise ValueError(
                f"config.json: {key} = {values[key]}, expected {allowed[0]}; "
                "this model computes nothing else"
            )
    given = {key: list(values[key]) for key in _KIND_LISTS if key in values}
    if not given or any(kinds != next(iter(given.values())) for kinds in given.values()):
        raise ValueError(
            f"config.json: {' and '.join(given) or _KIND_LISTS[0]} = "
            f"{list(given.values()) or 'missing'}, expected one list of 0 (lightning) and "
            "1 (softmax), one for each layer"
        )
    kinds = {number: kind for kind, number in TEXT_01_KINDS.items()}
    (key, numbers), ours = next(iter(given.items())), {v: k for k, v in TEXT_01_KEYS.items()}
    if wrong := sorted(set(numbers) - set(kinds)):
        raise ValueError(f"config.json: {key} holds {wrong}, expected only 0 and 1")
    foreign = {*_TEXT_01_FIXED, *_TEXT_01_FOREIGN, *_KIND_LISTS, "rope_theta", "postnorm"}
    config = HybridConfig(
        **{ours.get(k, k): value for k, value in values.items() if k not in foreign},
        layer_types=[kinds[number] for number in numbers],
        rope_parameters={"rope_type": "default", "rope_theta": values.get("rope_theta", 10_000.0)},
        # the published code reads a missing key as PreNorm
        postnorm=values.get("postnorm", False),
    )
    _refuse(config, layout)
    return config


def write_config(config: HybridConfig, *, layout: Layout) -> dict[str, Any]:
    """Our config as the config.json of a layout.

    Raises:
        ValueError: if the layout is unknown or cannot say what this model computes.

    Example:
        >>> keys = write_config(HybridConfig(num_hidden_layers=8), layout="text-01")
        >>> keys["attn_type_list"], keys["postnorm"], keys["model_type"]
        ([0, 0, 0, 0, 0, 0, 0, 1], True, 'minimax_text_01')
    """
    _check(layout)
    _refuse(config, layout)
    values: dict[str, Any] = json.loads(config.to_json_string())
    values |= {"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"]}
    if layout == "vllm":
        untied = {"rotary_dim": _rotary_dim(config), "tie_word_embeddings": False}
        return {**values, **_vllm_aliases(values), **untied}
    if layout != "text-01":
        return values
    kinds = [TEXT_01_KINDS[kind] for kind in values.pop("layer_types")]
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values = {TEXT_01_KEYS.get(key, key): value for key, value in values.items()}
    return {
        **values,
        "attn_type_list": kinds,
        "rotary_dim": _rotary_dim(config),
        "shared_intermediate_size": 0,
        "model_type": "minimax_text_01",
        "architectures": ["MiniMaxText01ForCausalLM"],
    }


def _vllm_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """The published names, which vLLM reads first, beside transformers' own."""
    kinds = [TEXT_01_KINDS[kind] for kind in values["layer_types"]]
    renamed = {theirs: values[ours] for ours, theirs in TEXT_01_KEYS.items()}
    theta = values["rope_parameters"]["rope_theta"]
    return {**renamed, "attn_type_list": kinds, "rope_theta": theta, "shared_intermediate_size": 0}


def _rotary_dim(config: HybridConfig) -> int | None:
    return config.head_dim if config.rotary_dim is None else config.rotary_dim


def _check(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}, expected one of {', '.join(LAYOUTS)}")


def _refuse(config: HybridConfig, layout: str) -> None:
    """What the engines of the published layout compute otherwise must not be written for them."""
    if layout not in ("text-01", "vllm"):
        return
    heads, sliding = config.num_attention_heads, "sliding_attention" in config.layer_types
    rules = (
        # their slopes of other head counts follow another series
        ("num_attention_heads", heads, heads & (heads - 1) == 0, "a power of two"),
        ("layer_types", "sliding_attention", not sliding, f"only {', '.join(TEXT_01_KINDS)}"),
        ("sliding_window", config.sliding_window, config.sliding_window is None, "null"),
    )
    for key, value, good, expected in rules:
        if not good:
            raise ValueError(
                f"config.json: {key} = {value}, expected {expected}: layout {layout} computes "
                "something else; write transformers-disk instead"
            )


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
